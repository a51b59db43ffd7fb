"""The manifest: all that may leave, from the lists that the gate holds replies to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.manifest import MessageItems, ScalarItem, manifest_of
from client.site_config import Egress, SiteConfig, load_site_config
from semisam_core.codecs import CODECS, leaving_bytes, leaving_spec
from semisam_core.contract import (
    JOIN_SCALARS,
    MASKED_VECTOR,
    MATERIAL,
    TRAIN_SCALARS,
    Stage,
    evaluation_scalars,
    is_count,
    update_spec,
)
from semisam_core.data.fingerprint import fingerprint_scalars
from semisam_core.plan import Plan
from semisam_core.secure_aggregation.fixed_point import vector_spec
from semisam_core.small_numbers import EXACT, IN_BUCKETS
from tests.conftest import tiny_plan, write_site

MakeSite = Callable[..., Path]


def _config(folder: Path, **changes: Any) -> SiteConfig:
    return load_site_config(write_site(folder, "alpha", **changes))


def test_it_lists_what_the_contract_agrees_for_each_message(tmp_path: Path, plan: Plan) -> None:
    found = manifest_of(_config(tmp_path), plan).messages
    assert set(found["join"].scalars) == set(JOIN_SCALARS)
    assert set(found["train"].scalars) == set(TRAIN_SCALARS)
    assert set(found["evaluate"].scalars) == set(evaluation_scalars(plan))
    assert set(found["fingerprint"].scalars) == set(fingerprint_scalars(plan.task))
    assert found["train"].tensors == update_spec(plan)
    assert not any(found[kind].tensors for kind in found if kind != "train")
    assert set(found["refusal"].texts) == {"site", "round", "plan-hash", "rule"}
    assert found["refusal"].scalars == {}


def test_by_default_counts_are_bucketed_and_numbers_about_few_patients_withheld(tmp_path: Path, plan: Plan) -> None:
    config = _config(tmp_path)
    careful = config.model_copy(update={"egress": Egress()})
    found = manifest_of(careful, plan).messages
    rules = {
        name: (str(each.rounding), each.minimum_patients)
        for kind in ("join", "train", "evaluate")
        for name, each in found[kind].scalars.items()
    }
    counts, digits = str(IN_BUCKETS), "2 significant digits"
    always = {"generalists": "exact", "steps": "exact", "head_steps": "exact", "seconds": digits}
    for name, rule in rules.items():
        if name in always:
            assert rule == (always[name], 0)
        elif name.partition(".")[0] in ("cases", "missing_distances"):
            assert rule == (counts, 5)
        elif is_count(name):
            assert rule == (counts, 0)
        else:
            assert rule == (digits, 5), name
    assert found["join"].texts["counts"].pattern == "buckets"
    assert found["fingerprint"].scalars["volume_ml.blob.median"].minimum_patients == 5


def test_what_the_site_keeps_is_not_listed(tmp_path: Path, plan: Plan) -> None:
    careful = _config(tmp_path, egress={"validation_scores": ["dice"], "fingerprint": False})
    found = manifest_of(careful, plan).messages
    assert set(found["evaluate"].scalars) == {"validation", "dice.blob"}
    assert "fingerprint" not in found


@pytest.mark.parametrize(("rounds", "every", "evaluations"), [(2, 1, 2), (10, 5, 2), (11, 5, 3), (3, 5, 1), (1, 1, 1)])
def test_it_counts_the_messages_of_a_whole_study(tmp_path: Path, rounds: int, every: int, evaluations: int) -> None:
    plan = tiny_plan(f"training.rounds={rounds}", f"evaluation.every_rounds={every}")
    found = manifest_of(_config(tmp_path), plan)
    assert {kind: each.times for kind, each in found.messages.items()} == {
        "join": 1,
        "train": rounds,
        "evaluate": evaluations,
        "refusal": 0,
        "fingerprint": 1,
    }
    assert found.most_bytes == sum(each.times * each.most_bytes for each in found.messages.values())


def test_bytes_are_those_of_the_tensors_numbers_and_texts(tmp_path: Path, plan: Plan) -> None:
    train = manifest_of(_config(tmp_path), plan).messages["train"]
    size = sum(torch.zeros(each.shape, dtype=each.dtype).nbytes for each in update_spec(plan).values())
    assert train.tensor_bytes == size
    assert train.most_bytes == size + 8 * len(TRAIN_SCALARS) + len("alpha") + 8 + 64 + 64


@pytest.mark.parametrize(
    "change",
    [
        {"plan": ["training.rounds=3"]},
        {"plan": ["evaluation.every_rounds=2"]},
        {"plan": ["specialist.arguments.channels=[4, 16]"]},
        {"plan": ["task.classes=[{name: lesion, value: 1}]"]},
        {"plan": ["aggregation={secure: {}, admission: {norm_factor: null}, minimum_sites: 3}"]},
        {"site": {"egress": {"maximum_update_mb": 9.0}}},
        {"site": {"egress": {"validation_scores": []}}},
        {"site": {"egress": {"numbers": "rounded"}}},
        {"site": {"egress": {"numbers": "rounded", "minimum_patients": 6}}},
        {"site": {"egress": {"numbers": "rounded", "significant_digits": 3}}},
        {"site": {"egress": {"fingerprint": False}}},
    ],
)
def test_whatever_lets_other_things_leave_changes_the_hash(tmp_path: Path, plan: Plan, change: dict[str, Any]) -> None:
    before = manifest_of(_config(tmp_path), plan).hash
    after = manifest_of(_config(tmp_path, **change.get("site", {})), tiny_plan(*change.get("plan", [])))
    assert after.hash != before


def test_what_changes_nothing_that_leaves_keeps_the_hash(tmp_path: Path, plan: Plan) -> None:
    before = manifest_of(_config(tmp_path), plan).hash
    assert manifest_of(_config(tmp_path, device="auto"), tiny_plan("seed=3")).hash == before


def test_its_json_is_whole_and_plain(tmp_path: Path, plan: Plan) -> None:
    content = json.loads(json.dumps(manifest_of(_config(tmp_path), plan).as_json(), allow_nan=False))
    assert content["messages"]["evaluate"]["scalars"]["dice.blob"] == {
        "lowest": 0,
        "highest": 1,
        "whole": False,
        "rounding": "exact",
        "minimum_patients": 0,
    }
    name, spec = next(iter(update_spec(plan).items()))
    assert content["messages"]["train"]["tensors"][name] == {"shape": list(spec.shape), "dtype": "float32"}


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "1", None])
def test_a_value_out_of_its_range_is_a_mistake(value: object) -> None:
    assert ScalarItem(0, 1, False).mistake(value) is not None
    assert ScalarItem(0, 1, False).mistake(1) is None


def test_a_message_without_anything_has_no_bytes() -> None:
    assert MessageItems(3).most_bytes == 0


@pytest.mark.parametrize("name", CODECS)
def test_with_a_codec_the_coded_tensors_are_listed_and_what_they_are_the_change_of(
    tmp_path: Path, plan: Plan, name: str
) -> None:
    coded = tiny_plan(f"aggregation.codec={{name: {name}}}")
    manifest = manifest_of(_config(tmp_path), coded)
    train = manifest.messages["train"]
    assert (train.tensors, train.change_of) == (leaving_spec(coded), update_spec(coded))
    assert train.tensor_bytes == leaving_bytes(coded) < leaving_bytes(plan)
    content = manifest.as_json()["messages"]["train"]
    assert (set(content["tensors"]), set(content["change_of"])) == (set(leaving_spec(coded)), set(update_spec(coded)))
    plain = manifest_of(_config(tmp_path), plan)
    assert "change_of" not in plain.as_json()["messages"]["train"]
    assert manifest.hash != plain.hash


def test_under_a_secure_sum_the_update_is_masked_and_its_stages_are_listed(tmp_path: Path) -> None:
    more = ("aggregation.secure={}", "aggregation.admission={norm_factor: null}", "aggregation.minimum_sites=3")
    plan = tiny_plan(*more)
    found = manifest_of(_config(tmp_path), plan).messages
    assert found["train"].tensors == {}
    assert set(found["train"].scalars) == set(TRAIN_SCALARS)
    vector = found[Stage.MASKED.value].tensors[MASKED_VECTOR]
    assert vector == vector_spec(update_spec(plan))
    for stage in Stage:
        assert found[stage.value].scalars == {}
        assert found[stage.value].material == MATERIAL[stage]
        assert found[stage.value].times == plan.training.rounds


@pytest.mark.parametrize("shown", [True, False])
def test_a_private_round_reports_no_more_than_its_counts_and_if_allowed_its_epsilon(
    tmp_path: Path, shown: bool
) -> None:
    plan = tiny_plan("privacy={noise_multiplier: 1.0, sampling_rate: 0.5}", "aggregation.weights=samples")
    config = _config(tmp_path)
    egress = config.egress.model_copy(update={"epsilon": shown, "numbers": "rounded"})
    scalars = manifest_of(config.model_copy(update={"egress": egress}), plan).messages["train"].scalars
    epsilon = {"epsilon.round", "epsilon.total", "epsilon.delta"}
    assert set(scalars) == {"labeled", "unlabeled", "steps"} | (epsilon if shown else set())
    for name in epsilon & set(scalars):  # of the plan, not of patients; rounding it down would be wrong
        assert (scalars[name].minimum_patients, scalars[name].rounding) == (0, EXACT)
