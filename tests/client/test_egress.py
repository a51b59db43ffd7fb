"""The only way out of a site: nothing leaves unless it is agreed, and every reply is audited first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.egress import EgressError, EgressGate, ManifestNotApprovedError
from client.manifest import Manifest, MessageItems, ScalarItem, TextItem
from client.restore import arriving_tensors
from client.site_config import Egress
from semisam_core.contract import SPECIALIST_RECORD, RefusalRule, TensorSpec, weights_sha256
from semisam_core.files import read_json_lines
from semisam_core.small_numbers import IN_BUCKETS, Rounding

SPEC = {"a": TensorSpec((2, 3), torch.float32), "b": TensorSpec((4,), torch.float32)}
GOOD = {"a": torch.ones(2, 3), "b": torch.arange(4.0)}


ITEMS = {"steps": ScalarItem(0, math.inf, True), "loss": ScalarItem(-math.inf, math.inf, False)}
TEXTS = {"site": TextItem("alpha", 5), "round": TextItem("[0-9]+", 8), "plan-hash": TextItem("[a-z]*", 64)}
MANIFEST = Manifest(
    "alpha", 3, {"train": MessageItems(3, ITEMS, TEXTS, SPEC), "evaluate": MessageItems(1, ITEMS, TEXTS)}
)


def _gate(folder: Path, **limits: float) -> EgressGate:
    gate = EgressGate("alpha", Egress(**limits), folder / "audit.jsonl")
    gate.agree(MANIFEST)
    return gate


def _reply(
    gate: EgressGate, scalars: dict[str, object] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> RecordDict:
    numbers: dict[str, Any] = dict(scalars or {"steps": 2})
    return gate.reply("train", "run", 3, "hash", numbers, tensors or GOOD)


def test_a_valid_reply_is_built_and_audited(tmp_path: Path) -> None:
    reply = _reply(_gate(tmp_path), {"steps": 2, "loss": 0.5})
    assert set(reply) == {"metrics", "site", "specialist"}
    (line,) = read_json_lines(tmp_path / "audit.jsonl")
    sent = arriving_tensors(reply.array_records["specialist"], SPEC)
    assert line["sha256"] == weights_sha256(sent) == weights_sha256(GOOD)
    assert line["scalars"] == dict(reply.metric_records["metrics"])
    assert (line["round"], line["run"], line["plan"], line["bytes"], line["tensors"]) == (3, "run", "hash", 40, 2)


@pytest.mark.parametrize(
    "scalars",
    [
        {"patients": 3},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"loss": True},
        {"loss": "0.5"},
        {"loss": [1.0]},
        {"steps": 1.5},
        {"steps": -1},
    ],
)
def test_only_agreed_finite_scalars_leave(tmp_path: Path, scalars: dict[str, object]) -> None:
    with pytest.raises(EgressError, match="scalar"):
        _reply(_gate(tmp_path), scalars)
    assert not (tmp_path / "audit.jsonl").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(2, 3)},
        GOOD | {"image": torch.ones(4, 4, 4)},
        GOOD | {"b": torch.ones(5)},
        GOOD | {"b": torch.ones(4, dtype=torch.float64)},
        GOOD | {"b": torch.tensor([0.0, float("nan"), 0.0, 0.0])},
        GOOD | {"b": torch.tensor([0.0, float("inf"), 0.0, 0.0])},
    ],
)
def test_only_agreed_finite_tensors_leave(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(EgressError, match="tensor"):
        _reply(_gate(tmp_path), tensors=tensors)
    assert not (tmp_path / "audit.jsonl").exists()


def test_an_update_over_the_sites_size_limit_does_not_leave(tmp_path: Path) -> None:
    with pytest.raises(EgressError, match=r"egress.maximum_update_mb allows 1e-05"):
        _reply(_gate(tmp_path, maximum_update_mb=1e-5))


def test_no_tensors_leave_where_none_are_agreed(tmp_path: Path) -> None:
    with pytest.raises(EgressError, match="no tensors are in the manifest"):
        _gate(tmp_path).reply("evaluate", "run", 1, "hash", {}, GOOD)


def test_a_kind_of_message_that_is_not_in_the_manifest_does_not_leave(tmp_path: Path) -> None:
    with pytest.raises(EgressError, match="no join is in the manifest"):
        _gate(tmp_path).reply("join", "run", 0, "hash", {})


def test_nothing_but_refusals_leaves_before_a_manifest_is_agreed(tmp_path: Path) -> None:
    gate = EgressGate("alpha", Egress(), tmp_path / "audit.jsonl")
    with pytest.raises(EgressError, match="no train is in the manifest"):
        _reply(gate)
    assert "refusal" in gate.refuse("train", "run", 1, RefusalRule.INTERNAL, "reason")


@pytest.mark.parametrize(
    ("site", "plan_hash", "number"), [("beta", "hash", 3), ("alpha", "Jane Doe", 3), ("alpha", "", -1)]
)
def test_texts_leave_only_in_their_form(tmp_path: Path, site: str, plan_hash: str, number: int) -> None:
    gate = EgressGate(site, Egress(), tmp_path / "audit.jsonl")
    gate.agree(MANIFEST)
    with pytest.raises(EgressError, match="is not of the form"):
        gate.reply("train", "run", number, plan_hash, {"steps": 2}, GOOD)
    assert not (tmp_path / "audit.jsonl").exists()


def test_a_text_that_is_not_in_the_manifest_does_not_leave(tmp_path: Path) -> None:
    reply = _gate(tmp_path).reply("evaluate", "run", 1, "hash", {}, split_hash="5" * 64)
    assert set(reply.config_records["site"]) == {"site", "round", "plan-hash"}


@pytest.mark.parametrize("approved", ["", "0" * 64])
def test_a_manifest_that_was_not_approved_lets_nothing_leave(tmp_path: Path, approved: str) -> None:
    gate = EgressGate("alpha", Egress(), tmp_path / "audit.jsonl", approved)
    with pytest.raises(ManifestNotApprovedError, match="semisam site approve"):
        gate.agree(MANIFEST)
    with pytest.raises(EgressError, match="no train is in the manifest"):
        _reply(gate)


def test_the_approved_manifest_lets_its_items_leave(tmp_path: Path) -> None:
    gate = EgressGate("alpha", Egress(), tmp_path / "audit.jsonl", MANIFEST.hash)
    gate.agree(MANIFEST)
    assert SPECIALIST_RECORD in _reply(gate)


@settings(deadline=None, max_examples=60)
@given(
    scalars=st.dictionaries(
        st.sampled_from(["steps", "loss", "share", "patient"]),
        st.one_of(st.integers(-5, 5), st.floats(-2, 2), st.just(math.nan), st.booleans()),
    ),
    patients=st.dictionaries(st.sampled_from(["loss", "share"]), st.integers(0, 9)),
)
def test_whatever_the_work_reports_only_what_the_manifest_lists_leaves(
    tmp_path_factory: pytest.TempPathFactory, scalars: dict[str, Any], patients: dict[str, int]
) -> None:
    items = {
        "steps": ScalarItem(0, math.inf, True, IN_BUCKETS),
        "loss": ScalarItem(-math.inf, math.inf, False, Rounding("digits", 2), minimum_patients=5),
        "share": ScalarItem(0, 1, False, Rounding("digits", 1), minimum_patients=3),
    }
    log = tmp_path_factory.mktemp("site") / "audit.jsonl"
    gate = EgressGate("alpha", Egress(), log)
    gate.agree(Manifest("alpha", 1, {"evaluate": MessageItems(1, items, TEXTS)}))
    try:
        reply = gate.reply("evaluate", "run", 1, "hash", scalars, patients=patients)
    except EgressError:
        assert not log.exists()
        return
    sent = dict(reply.metric_records["metrics"])
    assert set(sent) <= set(items)
    for name, value in sent.items():
        assert items[name].mistake(value) is None
        assert items[name].rounding(value) == value  # type: ignore[arg-type]
        assert patients.get(name, 0) >= items[name].minimum_patients
    assert read_json_lines(log)[0]["scalars"] == sent


def test_numbers_leave_rounded_as_the_manifest_says_and_are_logged_so(tmp_path: Path) -> None:
    rounded = {
        "steps": ScalarItem(0, math.inf, True, IN_BUCKETS),
        "loss": ScalarItem(0, 9, False, Rounding("digits", 2)),
    }
    gate = EgressGate("alpha", Egress(), tmp_path / "audit.jsonl")
    gate.agree(Manifest("alpha", 1, {"evaluate": MessageItems(1, rounded, TEXTS)}))
    reply = gate.reply("evaluate", "run", 1, "hash", {"steps": 17, "loss": 0.123456})
    assert dict(reply.metric_records["metrics"]) == {"steps": 10, "loss": 0.12}
    (line,) = read_json_lines(tmp_path / "audit.jsonl")
    assert line["scalars"] == {"steps": 10, "loss": 0.12}


def test_a_reply_that_cannot_be_audited_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(OSError, match="audit"):
        _reply(_gate(tmp_path))


def test_the_audit_log_is_append_only(tmp_path: Path) -> None:
    _reply(_gate(tmp_path))
    before = (tmp_path / "audit.jsonl").read_bytes()
    _reply(_gate(tmp_path), {"steps": 7})
    after = (tmp_path / "audit.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(read_json_lines(tmp_path / "audit.jsonl")) == 2


@settings(deadline=None, max_examples=50)
@given(reason=st.text(min_size=12), rule=st.sampled_from(RefusalRule))
def test_only_the_rule_of_a_refusal_leaves(
    tmp_path_factory: pytest.TempPathFactory, reason: str, rule: RefusalRule
) -> None:
    folder = tmp_path_factory.mktemp("site")
    reply = _gate(folder).refuse("train", "run", 1, rule, reason)
    assert {name: dict(record) for name, record in reply.items()} == {
        "refusal": {"rule": rule.value},
        "site": {"site": "alpha", "round": 1, "plan-hash": ""},
    }
    (line,) = (folder / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reason_kept_here"] == reason


def test_the_size_limit_counts_bytes_and_is_inclusive(tmp_path: Path) -> None:
    size = sum(value.nbytes for value in GOOD.values())
    assert SPECIALIST_RECORD in _reply(_gate(tmp_path, maximum_update_mb=size / 1e6))
    with pytest.raises(EgressError, match=r"egress.maximum_update_mb allows"):
        _reply(_gate(tmp_path, maximum_update_mb=(size - 1) / 1e6))


def test_a_refusal_that_cannot_be_audited_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(OSError, match="audit"):
        _gate(tmp_path).refuse("train", "run", 1, RefusalRule.INTERNAL, "reason")


def test_the_hash_of_refused_code_stays_at_the_site(tmp_path: Path) -> None:
    code = "c0de" * 16
    reply = _gate(tmp_path).refuse("train", "run", 1, RefusalRule.CODE_NOT_APPROVED, "reason", code)
    assert code not in repr({name: dict(record) for name, record in reply.items()})
    (line,) = read_json_lines(tmp_path / "audit.jsonl")
    assert line["code"] == code


def test_the_audited_hash_is_that_of_the_tensors_sent_whatever_their_layout(tmp_path: Path) -> None:
    transposed = {"a": torch.arange(6.0).reshape(3, 2).T, "b": GOOD["b"].clone().requires_grad_()}
    sent = arriving_tensors(_reply(_gate(tmp_path), tensors=transposed).array_records[SPECIALIST_RECORD], SPEC)
    assert all(torch.equal(sent[name], transposed[name]) for name in transposed)
    (line,) = read_json_lines(tmp_path / "audit.jsonl")
    assert line["sha256"] == weights_sha256(sent)
