"""Small numbers: what is about few patients does not leave, and what leaves is coarse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.egress import EgressError, EgressGate
from client.manifest import manifest_of
from client.report import score_patients, training_patients
from client.site import Site
from client.site_config import Egress, SiteConfig, load_site_config
from semisam_core.evaluation import ClassScore
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
SCORE = ClassScore(0.876543, 0.7, 3.21987, 1.0, 0.9)
NO_DISTANCE = ClassScore(0.0, 0.0, None, None, 0.0)


def _gate(config: SiteConfig, plan: Plan) -> EgressGate:
    gate = EgressGate(config.site, config.egress, config.storage.folder / "audit.jsonl")
    gate.agree(manifest_of(config, plan))
    return gate


def _sent(config: SiteConfig, plan: Plan, patients: dict[str, int], **scalars: Any) -> dict[str, float | int]:
    numbers = {name.replace("__", "."): value for name, value in scalars.items()}
    about = ("run", 1, plan.hash)
    reply = _gate(config, plan).reply("evaluate", *about, numbers, patients=patients)
    return dict(reply.metric_records["metrics"])  # type: ignore[arg-type]


def test_sites_are_careful_unless_their_file_says_otherwise() -> None:
    assert (Egress().numbers, Egress().minimum_patients, Egress().significant_digits) == ("rounded", 5, 2)


@pytest.mark.parametrize(("patients", "leaves"), [(0, False), (1, False), (4, False), (5, True), (60, True)])
def test_a_score_of_fewer_patients_than_the_minimum_is_withheld(
    make_site: MakeSite, plan: Plan, patients: int, leaves: bool
) -> None:
    config = load_site_config(make_site(egress={"numbers": "rounded"}))
    sent = _sent(config, plan, {"dice.blob": patients}, validation=7, dice__blob=0.876543)
    assert sent == {"validation": 5} | ({"dice.blob": 0.88} if leaves else {})
    (line,) = read_json_lines(config.storage.folder / "audit.jsonl")
    assert line["scalars"] == sent
    assert line.get("withheld") == (None if leaves else ["dice.blob"])


def test_a_sensitive_number_of_unknown_patients_does_not_leave(make_site: MakeSite, plan: Plan) -> None:
    config = load_site_config(make_site(egress={"numbers": "rounded"}))
    with pytest.raises(EgressError, match=r"about how many patients the scalar dice\.blob is"):
        _sent(config, plan, {}, validation=7, dice__blob=0.5)


def test_exact_numbers_leave_if_the_sites_file_says_so(make_site: MakeSite, plan: Plan) -> None:
    config = load_site_config(make_site(egress={"numbers": "exact"}))
    assert _sent(config, plan, {}, validation=7, dice__blob=0.876543) == {"validation": 7, "dice.blob": 0.876543}


def test_the_digits_are_the_sites_choice(make_site: MakeSite, plan: Plan) -> None:
    config = load_site_config(make_site(egress={"numbers": "rounded", "significant_digits": 3}))
    assert _sent(config, plan, {"hd95_mm.blob": 9}, hd95_mm__blob=3.21987) == {"hd95_mm.blob": 3.22}


def test_patients_are_counted_not_scans_and_for_each_score_apart() -> None:
    scores = [[SCORE, None], [SCORE, None], [NO_DISTANCE, SCORE]]
    found = score_patients(scores, ["jane", "jane", "john"], ["organ", "lesion"])
    assert (found["dice.organ"], found["cases.organ"], found["missing_distances.organ"]) == (2, 2, 2)
    assert (found["hd95_mm.organ"], found["asd_mm.organ"], found["surface_dice.organ"]) == (1, 1, 2)
    assert (found["dice.lesion"], found["hd95_mm.lesion"]) == (1, 1)


def test_losses_are_about_those_whom_their_term_teaches() -> None:
    names = ("loss.supervised", "gradient.consistency", "loss.generalist", "seconds", "labeled")
    assert training_patients(names, 1, 5, 3) == {
        "loss.supervised": 1,
        "gradient.consistency": 5,
        "loss.generalist": 3,
        "confidence": 3,
    }


def test_repeat_scans_of_one_patient_do_not_make_a_score_leave(make_site: MakeSite, tmp_path: Path) -> None:
    """Five validation scans: of one patient by the manifest, then of five."""
    plan = tiny_plan()
    held_out = [f"case-{k}" for k in range(1, 6)]
    path = make_site(cases=6, data={"labeled": ["case-0"], "validation": held_out}, egress={"numbers": "rounded"})
    config = load_site_config(path)
    weights = {name: torch.clone(value) for name, value in new_specialist(plan).state_dict().items()}
    for number, leaves in ((1, False), (5, True)):
        cases = [{"case": f"case-{k}", "patient": f"p{min(k, number) if k else 0}"} for k in range(6)]
        manifest = tmp_path / "data" / "alpha" / "manifest.json"
        manifest.write_text(json.dumps({"version": 1, "cases": cases}))
        report = Site(config, plan, f"run-{number}", 1).evaluate(weights, final=False)
        assert report.patients["dice.blob"] == number
        about = (f"run-{number}", 1, plan.hash)
        reply = _gate(config, plan).reply("evaluate", *about, report.scalars, patients=report.patients)
        sent = dict(reply.metric_records["metrics"])
        assert sent["validation"] == 5
        assert ("dice.blob" in sent) == leaves
    lines = (config.storage.folder / "audit.jsonl").read_text()
    assert "patients" not in lines


def test_a_round_of_few_patients_sends_buckets_and_steps_but_no_losses(make_site: MakeSite) -> None:
    plan = tiny_plan()
    config = load_site_config(make_site(egress={"numbers": "rounded"}))
    weights = dict(new_specialist(plan).state_dict())
    report = Site(config, plan, "run", 1).train(weights)
    assert "loss.supervised" in report.scalars
    reply = _gate(config, plan).reply(
        "train", "run", 1, plan.hash, report.scalars, report.weights, patients=report.patients
    )
    sent = dict(reply.metric_records["metrics"])
    assert {name.partition(".")[0] for name in sent} == {
        "labeled",
        "unlabeled",
        "accepted",
        "gated",
        "steps",
        "seconds",
    }
    assert (sent["labeled"], sent["unlabeled"], sent["steps"]) == (1, 1, 2)
    assert sent["seconds"] == float(f"{sent['seconds']:.2g}")  # type: ignore[str-format]
