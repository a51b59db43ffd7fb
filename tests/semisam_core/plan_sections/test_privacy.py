"""Which plans go with differential privacy, and what is said of the others."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from semisam_core.plan import Plan, plan_from_json
from semisam_core.regularizers import NONE, REGULARIZERS, RegularizerSpec
from tests.conftest import tiny_plan

PRIVACY = "privacy={noise_multiplier: 1.0, sampling_rate: 0.1}"
EVIDENCE = "pseudo_labels.method=evidence"
PRIVATE = {"mean-teacher", "ua-mt", "entropy-minimisation", "fixmatch"}


def _refusal(*changes: str) -> str:
    with pytest.raises(ValidationError) as refused:
        tiny_plan(PRIVACY, *changes)
    return str(refused.value)


def test_without_the_section_there_is_no_privacy_and_the_hash_stays_as_it_was() -> None:
    assert tiny_plan().privacy is None
    assert tiny_plan("privacy=null").hash == tiny_plan().hash
    assert "privacy" not in tiny_plan().canonical_json()


def test_a_private_plan_survives_serialisation_and_has_another_hash() -> None:
    plan = tiny_plan(PRIVACY)
    assert plan_from_json(plan.canonical_json()) == plan
    assert plan.hash != tiny_plan().hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("regularizer.name=ict", "regularizer.name: ict mixes patches of several patients"),
        ("regularizer.name=bcp", "regularizer.name: bcp mixes patches of several patients"),
        ("regularizer.name=cps", "regularizer.name: cps trains a network of its own on all patients without noise"),
        ("regularizer.name=dan", "regularizer.name: dan trains a network of its own on all patients without noise"),
        ("specialist.arguments.normalization=batch", "normalization: batch computes its statistics over several"),
        ("aggregation.weights=evidence", "aggregation.weights: evidence needs the number of accepted pseudo-labels"),
        ("aggregation.weights=confidence", "aggregation.weights: confidence needs"),
        ("pseudo_labels.gates.volume_factor=2.0", "gates.volume_factor takes plausible volumes from other patients'"),
        ("pseudo_labels.cold_start={generalist: fake, until_round: 1}", "cold_start takes prototypes from other"),
        (EVIDENCE, "pseudo_labels.method: evidence scores its sources on other patients' labels; choose semisam"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_with_its_key(change: str, says: str) -> None:
    needed = {"ict": ["training.unlabeled_batch=2"], "batch": ["specialist.statistics=shared"]}
    changes = [change, *needed.get(change.rpartition("=")[2], [])]
    assert says in _refusal(*changes)
    assert tiny_plan(*changes).privacy is None


@pytest.mark.parametrize("key", ["registration", "volume_tolerance", "feature_head", "prototypes"])
def test_each_source_that_learns_from_labels_is_named(key: str) -> None:
    value = {"registration": "{}", "volume_tolerance": "1.25"}.get(key, "{generalist: fake}")
    off = [f"pseudo_labels.sources.{other}=null" for other in ("registration", "volume_tolerance")]
    named = f"pseudo_labels.sources.{key} "
    assert named not in _refusal(EVIDENCE, *off)
    assert named in _refusal(EVIDENCE, *off, f"pseudo_labels.sources.{key}={value}")


def test_all_mistakes_are_named_at_once() -> None:
    says = _refusal("regularizer.name=bcp", "aggregation.weights=evidence")
    assert "bcp" in says
    assert "aggregation.weights" in says


@pytest.mark.parametrize("name", sorted(PRIVATE | {NONE}))
def test_regularizers_that_keep_patients_apart_are_accepted(name: str) -> None:
    assert isinstance(tiny_plan(PRIVACY, f"regularizer.name={name}"), Plan)


def test_a_regularizer_is_refused_unless_it_was_shown_to_keep_patients_apart() -> None:
    assert {name for name, spec in REGULARIZERS.items() if spec.not_private is None} == PRIVATE
    assert RegularizerSpec(lambda context: REGULARIZERS["ict"].build(context)).not_private is not None


@pytest.mark.parametrize("normalization", ["instance", "group"])
def test_networks_that_normalise_each_patch_by_itself_are_accepted(normalization: str) -> None:
    arguments = f"{{channels: [8, 16], strides: [2], residual_units: 0, normalization: {normalization}}}"
    assert isinstance(tiny_plan(PRIVACY, f"specialist.arguments={arguments}"), Plan)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("privacy.sampling_rate=0", "greater than 0"),
        ("privacy.sampling_rate=1.5", "less than or equal to 1"),
        ("privacy.noise_multiplier=0", "greater than 0"),
        ("privacy.clipping_norm=0", "greater than 0"),
        ("privacy.delta=0.1", "less than or equal to 0.001"),
        ("privacy.epsilon=3", "Extra inputs"),
    ],
)
def test_settings_out_of_range_are_refused(change: str, says: str) -> None:
    assert says in _refusal(change)
