"""The server works with counts in buckets and without what is withheld."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from client.app import app as client_app
from engines.in_process_grid import run_in_process
from engines.results import collect, results_table
from semisam_core.contract import RejectionRule
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from semisam_core.small_numbers import bucket
from server.admission import Admitted, NotAdmitted, Rejected, admit
from server.app import app as server_app
from tests.conftest import tiny_plan
from tests.server.replies import NODE, answer, train_records

MakeSite = Callable[..., Path]
ROUNDED = {"numbers": "rounded"}


def _run(plan: Plan, sites: list[Path], folder: Path) -> list[dict[str, Any]]:
    (folder.parent / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"num-sites": len(sites), "run-folder": str(folder)}
    config["plan"] = str(folder.parent / "plan.yaml")
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    return read_json_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("weights", ["samples", "confidence"])
def test_a_study_in_which_no_site_sends_a_score_runs_to_its_end(
    make_site: MakeSite, tmp_path: Path, weights: str
) -> None:
    plan = tiny_plan("selection=validation", f"aggregation.weights={weights}")
    six = [f"case-{k}" for k in range(6)]
    sites = [
        make_site("alpha", egress=ROUNDED),
        make_site("beta", cases=8, first_seed=10, data={"labeled": six, "validation": ["case-7"]}, egress=ROUNDED),
    ]
    lines = _run(plan, sites, tmp_path / "run")
    joined = {line["site"]: line for line in lines if line["event"] == "joined"}
    assert [joined[name]["counts"] for name in ("alpha", "beta")] == ["buckets", "buckets"]
    assert [joined["beta"][role] for role in ("labeled", "unlabeled", "validation")] == [5, 1, 1]
    scored = [line for line in lines if line["event"] == "evaluated"]
    assert len(scored) == 4
    assert not any(key.startswith(("dice", "hd95", "cases")) for line in scored for key in line)
    (selected,) = [line for line in lines if line["event"] == "selected"]
    assert (selected["round"], selected["by"]) == (2, "last round; no site sent a validation score")
    if weights == "samples":  # 1-4 + 1-4 scans against 5-9 + 1-4, by the middles of the buckets
        shares = [line["weights"] for line in lines if line["event"] == "aggregated"]
        expected = {"alpha": 5 / 14.5, "beta": 9.5 / 14.5}
        assert shares == [pytest.approx(expected)] * 2
    console = Console(width=200, record=True)
    console.print(results_table(collect(tmp_path / "run", {}, plan.class_names), "tiny", "last round"))
    shown = " ".join(console.export_text().split())
    assert "5-9 / 1-4" in shown
    assert "- / withheld" in shown


def test_sites_that_send_rounded_scores_select_a_round(make_site: MakeSite, tmp_path: Path) -> None:
    plan = tiny_plan("selection=validation")
    held_out = [f"case-{k}" for k in range(2, 7)]
    sites = [
        make_site("alpha", cases=7, data={"labeled": ["case-0"], "validation": held_out}, egress=ROUNDED),
        make_site("beta", first_seed=10, egress=ROUNDED),
    ]
    lines = _run(plan, sites, tmp_path / "run")
    scores = {line["site"]: line.get("dice.blob") for line in lines if line["event"] == "evaluated"}
    assert scores["beta"] is None
    assert scores["alpha"] == float(f"{scores['alpha']:.2g}")
    (selected,) = [line for line in lines if line["event"] == "selected"]
    assert selected["by"].startswith("mean validation Dice")


COUNTS = st.integers(0, 120)


@settings(deadline=None, max_examples=60)
@given(declared=st.tuples(COUNTS, COUNTS, COUNTS), lost=st.integers(0, 120), shares=st.tuples(*[st.floats(0, 1)] * 2))
def test_an_honest_site_in_buckets_is_admitted_whatever_its_counts(
    declared: tuple[int, int, int], lost: int, shares: tuple[float, float]
) -> None:
    """Scans may be quarantined or repaired after joining; each of the rest may have a pseudo-label, or be gated."""
    labeled, unlabeled, quarantined = declared
    repaired = int(quarantined * shares[0])
    now = max(0, unlabeled + repaired - lost)
    accepted = int(now * shares[1])
    true = {"labeled": labeled, "unlabeled": now, "accepted": accepted, "gated": now - accepted}
    said = {
        name: float(bucket(count))
        for name, count in {
            "labeled": labeled,
            "unlabeled": unlabeled,
            "validation": 0,
            "quarantined": quarantined,
        }.items()
    }
    found = _train({name: bucket(count) for name, count in true.items()}, said)
    assert isinstance(found, Admitted), found
    assert found.bucketed
    for name, count in true.items():
        assert bucket(int(found.estimates[name])) == bucket(count)
    assert found.scalars["steps"] == found.estimates["steps"] == 2


def _train(scalars: dict[str, int], declared: dict[str, float]) -> Admitted | NotAdmitted:
    plan = tiny_plan()
    records = train_records(plan) | {"metrics": MetricRecord({"confidence": 0.5, "steps": 2, **scalars})}
    return answer(plan, records, declared, bucketed=True)


@pytest.mark.parametrize(
    ("scalars", "says"),
    [
        ({"labeled": 3}, "labeled is 3, which begins no bucket"),
        ({"labeled": 20}, "labeled + unlabeled is 25 but can be at most 17"),
        ({"accepted": 5, "gated": 5}, "accepted + gated is 10 but can be at most 9"),
    ],
)
def test_counts_beyond_the_declared_buckets_are_rejected(scalars: dict[str, int], says: str) -> None:
    declared = {"labeled": 1.0, "unlabeled": 5.0, "validation": 1.0, "quarantined": 1.0}
    found = _train({"labeled": 1, "unlabeled": 5, "accepted": 1, **scalars}, declared)
    assert isinstance(found, Rejected)
    assert found.rule is RejectionRule.COUNTS
    assert says in found.reason


@pytest.mark.parametrize(("word", "bucketed"), [(None, False), ("exact", False), ("buckets", True), ("thirds", None)])
def test_a_site_says_when_it_joins_how_it_counts(plan: Plan, word: str | None, bucketed: bool | None) -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, NODE
    about = {"site": "alpha", "round": 0, "plan-hash": plan.hash} | ({} if word is None else {"counts": word})
    counts = {"labeled": 1, "unlabeled": 5, "validation": 0, "quarantined": 0}
    content = {"site": ConfigRecord({**about}), "metrics": MetricRecord({**counts})}
    reply = Message(RecordDict({**content}), reply_to=Message(RecordDict(), NODE, MessageType.QUERY))
    found = admit(reply, MessageType.QUERY, 0, plan, None)
    assert (found.bucketed if isinstance(found, Admitted) else None) == bucketed


def test_exact_counts_are_weighed_as_they_are(plan: Plan) -> None:
    found = answer(plan, train_records(plan))
    assert isinstance(found, Admitted)
    assert found.estimates == found.scalars
