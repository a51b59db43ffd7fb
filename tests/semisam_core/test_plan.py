"""The plan: typed, versioned, hashed, with errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.errors import ConfigError
from semisam_core.plan import Plan, load_plan, plan_from_json
from semisam_core.plan_sections.aggregation import SecureAggregation
from tests.conftest import TINY_PLAN, tiny_plan

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "site_configs").glob("*/plan*.yaml"))


def _load(folder: Path, content: object, *assignments: str) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return load_plan(path, list(assignments))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_plans_load_and_explain_every_section(path: Path) -> None:
    plan = load_plan(path)
    text = path.read_text()
    for section in Plan.model_fields:
        assert f"\n{section}:" in f"\n{text}", section
    assert text.count("#") > 25
    assert plan_from_json(plan.canonical_json()) == plan


def test_the_hash_ignores_key_order_and_explicit_defaults(tmp_path: Path) -> None:
    plain = _load(tmp_path, TINY_PLAN)
    reordered = _load(tmp_path, dict(reversed(TINY_PLAN.items())))
    explicit = _load(tmp_path, plain.model_dump(mode="json"))
    assert plain.hash == reordered.hash == explicit.hash


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(1, 2**31 - 1), rounds=st.integers(3, 100), weight=st.floats(0.2, 100))
def test_any_change_changes_the_hash(seed: int, rounds: int, weight: float) -> None:
    changes = (f"seed={seed}", f"training.rounds={rounds}", f"regularizer.weight={weight}")
    hashes = {tiny_plan().hash, *(tiny_plan(change).hash for change in changes)}
    assert len(hashes) == 4


@settings(deadline=None, max_examples=25)
@given(rounds=st.integers(1, 100), share=st.floats(0, 1))
def test_a_plan_survives_serialisation(rounds: int, share: float) -> None:
    plan = tiny_plan(f"training.rounds={rounds}", f"data.foreground_share={share}")
    assert plan_from_json(plan.canonical_json()).hash == plan.hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.round=3", "training.round: unknown key"),
        ("training.rounds=three", "training.rounds = 'three': .*integer"),
        ("training.rounds=0", "training.rounds = 0: .*greater than or equal to 1"),
        ("training.rounds=true", "training.rounds = True: .*integer"),
        ("version=2", "version = 2: .*1"),
        ("data.patch=[16, 16, 9]", r"data.patch\[2\] = 9 does not fit .*a multiple of 2"),
        ("data.intensity={kind: window, lower: 5, upper: 1}", r"lower \(5.0\) must be below upper \(1.0\)"),
        ("data.intensity={kind: percentiles, lower: 1, upper: 101}", "between 0 and 100"),
        ("data.spacing_mm=[0, 1, 1]", "between 0.05 and 20"),
        ("task.classes=[{name: a, value: 1}, {name: b, value: 1}]", "every class value must differ"),
        ("task.classes=[{name: a, value: 1}, {name: a, value: 2}]", "every class name must differ"),
        ("task.classes=[]", "task.classes"),
        ("specialist.name=vnet9", "unknown specialist 'vnet9'; accepted: .*unet"),
        ("pseudo_labels.generalists=[sam-9]", "no generalist is named 'sam-9'; accepted are fake, lite-medsam"),
        (
            "pseudo_labels.prompting.strategy=points",
            "prompting.strategy points makes points-2d, points-3d; the generalist fake takes box-2d",
        ),
        ("pseudo_labels.prompting.planes=[axial, axial]", "each plane may be named only once"),
        ("training.augmentation.flip_axes=[right-left, right-left]", "flip_axes names an axis twice"),
        ("training.augmentation.flip_axes=[left]", "flip_axes.*'right-left', 'anterior-posterior'"),
        ("pseudo_labels.gates.volume_factor=1.0", "greater than 1"),
        ("pseudo_labels.prompting.smooth_slices=4", "must be odd"),
        ("pseudo_labels.gates.maximum_volume_ml=0.01", "must be below maximum_volume_ml"),
        (
            "pseudo_labels.cold_start={until_round: 1, generalist: vista3d}",
            "the embeddings of vista3d are not feature maps of slices; accepted are fake, lite-medsam, medsam, sam",
        ),
        (
            "pseudo_labels.cold_start={until_round: 1, generalist: lite-medsam}",
            "cold_start.generalist lite-medsam is not in pseudo_labels.generalists; accepted are fake",
        ),
        ("pseudo_labels.cold_start={until_round: 1, generalist: sam-9}", "no generalist is named 'sam-9'"),
        ("pseudo_labels.cold_start={until_round: 0, generalist: fake}", "greater than or equal to 1"),
        ("aggregation.rule=mode", "aggregation.rule = 'mode': .*weighted-mean.*median.*trimmed-mean.*krum"),
        ("aggregation.rule=median", "the rule median needs the updates of 3 sites .* and minimum_sites is 1"),
        ("aggregation={rule: trimmed-mean, trim_share: 0.1, minimum_sites: 9}", "trimmed-mean needs .* of 10 sites"),
        ("aggregation={rule: krum, malicious_sites: 2, minimum_sites: 6}", "krum needs .* of 7 sites"),
        ("aggregation={rule: multi-krum, minimum_sites: 4}", "multi-krum needs .* of 5 sites"),
        ("aggregation.trim_share=0.5", "less than 0.5"),
        ("aggregation={secure: {}, rule: median, minimum_sites: 3}", "median compares single updates.* only their sum"),
        ("aggregation={secure: {}, rule: trimmed-mean, minimum_sites: 5}", "trimmed-mean compares single updates"),
        ("aggregation={secure: {}, rule: krum, minimum_sites: 5}", "krum compares single updates"),
        ("aggregation={secure: {}, rule: multi-krum, minimum_sites: 5}", "multi-krum compares single updates"),
        ("aggregation={secure: {}, minimum_sites: 3}", "norm_factor compares the norms of single updates.* null"),
        ("aggregation={secure: {}, admission: {norm_factor: null}, minimum_sites: 2}", "from 3 to 64, and it is 2"),
        ("aggregation={secure: {}, admission: {norm_factor: null}, minimum_sites: 65}", "from 3 to 64, and it is 65"),
        ("aggregation.secure={threshold: 0.5}", "threshold.* greater than 0.5"),
        ("aggregation.secure={maximum_norm: 10001}", "maximum_norm.*less than or equal to 10000"),
        ("aggregation.secure={maximum_weight: 1025}", "maximum_weight.*less than or equal to 1024"),
        ("aggregation.malicious_sites=0", "greater than or equal to 1"),
        ("aggregation.admission.norm_factor=1.0", "greater than 1"),
        ("aggregation.server_optimizer={name: adam}", "the server optimizer adam needs a learning_rate"),
        ("aggregation.server_optimizer={name: lion}", "none.*momentum.*adam"),
        ("training.proximal=-0.1", "greater than or equal to 0"),
        ("seed=-1", "seed = -1"),
    ],
)
def test_an_invalid_plan_is_refused_with_file_key_value_and_what_is_accepted(
    tmp_path: Path, change: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=rf"plan\.yaml: (?s:.)*{says}"):
        _load(tmp_path, TINY_PLAN, change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("- a\n- b\n", "mapping"),
        ("a: [1\n", "YAML"),
        ("", "mapping"),
    ],
)
def test_a_file_that_is_not_a_plan_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"plan\.yaml(?s:.)*{says}"):
        _load(tmp_path, text)


def test_a_missing_file_and_a_bad_override_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_plan(tmp_path / "absent.yaml")
    for assignment, says in (("seed", "expected key=value"), ("seed.x=1", "no keys below"), ("seed=[", "valid YAML")):
        with pytest.raises(ConfigError, match=says):
            _load(tmp_path, TINY_PLAN, assignment)


@settings(deadline=None, max_examples=50)
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_from_the_server_is_a_plan_or_a_config_error(content: Any) -> None:
    import json

    for text in (json.dumps(content), json.dumps(TINY_PLAN | {"training": content})):
        with pytest.raises(ConfigError):
            plan_from_json(text)


def test_pseudo_labels_are_refreshed_on_schedule() -> None:
    policy = tiny_plan("pseudo_labels.first_round=3", "pseudo_labels.refresh_every=2").pseudo_labels
    assert policy is not None
    assert [number for number in range(1, 9) if policy.due(number)] == [3, 5, 7]


def test_a_cold_start_that_leaves_rounds_without_pseudo_labels_is_refused() -> None:
    changes = ("pseudo_labels.first_round=4", "pseudo_labels.cold_start={until_round: 2, generalist: fake}")
    with pytest.raises(ValueError, match=r"until_round \(2\) leaves rounds without .* first_round \(4\).* at least 3"):
        tiny_plan(*changes)


def test_pseudo_labels_are_refreshed_right_after_a_cold_start() -> None:
    cold = "pseudo_labels.cold_start={until_round: 3, generalist: fake}"
    policy = tiny_plan("pseudo_labels.first_round=3", "pseudo_labels.refresh_every=3", cold).pseudo_labels
    assert policy is not None
    assert [number for number in range(1, 10) if policy.cold(number)] == [1, 2, 3]
    assert [number for number in range(4, 10) if policy.due(number)] == [4, 6, 9]


@pytest.mark.parametrize(
    "aggregation",
    [
        "{rule: median, minimum_sites: 3}",
        "{rule: trimmed-mean, trim_share: 0.1, minimum_sites: 10}",
        "{rule: krum, malicious_sites: 2, minimum_sites: 7}",
        "{rule: multi-krum, minimum_sites: 5, server_optimizer: {name: adam, learning_rate: 0.01}}",
    ],
)
def test_a_robust_rule_needs_its_minimum_of_sites_and_a_site_alone_has_no_rule(
    aggregation: str,
) -> None:
    plan = tiny_plan(f"aggregation={aggregation}", "training.proximal=0.5")
    assert plan.aggregation.minimum_sites == plan.aggregation.least_updates
    alone = plan_from_json(plan.alone().canonical_json())
    assert (alone.aggregation.rule, alone.aggregation.minimum_sites) == ("weighted-mean", 1)
    assert alone.aggregation.server_optimizer.name == "none"
    assert alone.training.proximal == 0


def test_a_secure_sum_can_be_completed_by_more_than_half_of_its_sites() -> None:
    least, most = SecureAggregation(threshold=0.51), SecureAggregation(threshold=1)
    assert [least.shares_needed(sites) for sites in range(3, 9)] == [2, 3, 3, 4, 4, 5]
    assert [SecureAggregation().shares_needed(sites) for sites in range(3, 9)] == [2, 3, 4, 4, 5, 6]
    assert [most.shares_needed(sites) for sites in range(3, 6)] == [3, 4, 5]


def test_a_plan_without_a_secure_sum_keeps_its_hash_and_a_site_alone_has_none() -> None:
    assert '"secure"' not in tiny_plan("aggregation.secure=null").canonical_json()
    plan = tiny_plan("aggregation={secure: {}, admission: {norm_factor: null}, minimum_sites: 3}")
    assert plan_from_json(plan.canonical_json()).hash == plan.hash != tiny_plan().hash
    assert plan.alone().aggregation.secure is None
