"""What the definition of a comparison accepts, and how it refuses everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experiments.comparison.arms import arm_names, arm_of, oracle_arms, oracle_omissions
from experiments.comparison.compare import definition_changes
from experiments.comparison.definition import define, label_counts
from semisam_core.errors import ConfigError, WeightsError
from semisam_core.generalists import Generalist, GeneralistSpec, PromptKind, registry
from semisam_core.plan import plan_from_json
from semisam_core.regularizers import NONE
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import CARD


def test_the_defaults_are_every_arm_of_the_plan_with_the_plans_seed() -> None:
    definition = define({}, tiny_plan("seed=7"), "comparison")
    assert definition.arms == tuple(
        f"{who}-{what}" for who in ("federated", "alone", "pooled") for what in ("supervised", "regularizer", "semisam")
    )
    assert (definition.seeds, definition.labeled) == ((7,), ("all",))
    assert definition.baseline == "federated-supervised"


def test_arms_that_the_plan_cannot_run_are_not_among_the_defaults() -> None:
    assert arm_names(tiny_plan("pseudo_labels=null", "regularizer.name=none")) == (
        "federated-supervised",
        "alone-supervised",
        "pooled-supervised",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"arms": ["federated"]}, "'federated': there is no such arm; accepted: federated-supervised, "),
        ({"arms": []}, "comparison: arms"),
        ({"arms": ["alone-semisam", "alone-semisam"]}, "name each only once"),
        ({"baseline": "pooled-none"}, "baseline = 'pooled-none': not one of the arms"),
        ({"seeds": [1, 1]}, "name each only once"),
        ({"seeds": [-1]}, "seeds are between 0 and 2147483647"),
        ({"labeled": ["some"]}, "'some' is not a label count; accepted: all, a number, or one per site as in 1,1,0"),
        ({"labelled": ["all"]}, "labelled: unknown key"),
    ],
)
def test_a_mistake_is_a_sentence_with_its_key(content: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        define(content, tiny_plan(), "comparison")
    assert says in str(caught.value)


def test_an_arm_that_the_plan_cannot_run_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="the plan has no pseudo_labels section"):
        arm_of("alone-semisam", tiny_plan("pseudo_labels=null"))
    with pytest.raises(ConfigError, match="the plan's regularizer is none"):
        arm_of("alone-regularizer", tiny_plan("regularizer.name=none"))


def test_an_arm_leaves_out_loss_terms_and_nothing_else() -> None:
    plan = tiny_plan("aggregation.minimum_sites=2")
    assert arm_of("federated-semisam", plan).plan(plan, plan.seed) == plan
    alone = arm_of("alone-supervised", plan).plan(plan, 3)
    assert (alone.seed, alone.regularizer.name, alone.pseudo_labels) == (3, NONE, None)
    assert alone.aggregation.minimum_sites == 1
    assert (alone.training, alone.data, alone.specialist) == (plan.training, plan.data, plan.specialist)


EVIDENCE = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.schedule=ramp-up",
    "pseudo_labels.loss={squared: 1.0, cross_entropy: 0.5, dice: 0.5}",
    "pseudo_labels.sources={feature_head: {generalist: fake}, prototypes: {generalist: fake}}",
)
SOURCES = ("specialist", "generalists", "feature-head", "registration", "prototypes")


def test_a_plan_by_evidence_has_an_arm_of_the_paper_and_one_without_each_source() -> None:
    plan = tiny_plan(*EVIDENCE)
    expected = {f"federated-{what}" for what in ("supervised", "regularizer", "paper", "semisam")}
    without = {f"federated-without-{source}" for source in (*SOURCES, "volume-tolerance")}
    assert {name for name in arm_names(plan) if name.startswith("federated-")} == expected | without
    assert {name for name in define({}, plan, "x").arms if name.startswith("federated-")} == expected


@pytest.mark.parametrize("source", [*SOURCES, "volume-tolerance"])
def test_an_arm_without_a_source_changes_nothing_else(source: str) -> None:
    plan, key = tiny_plan(*EVIDENCE), source.replace("-", "_")
    changed = arm_of(f"federated-without-{source}", plan).plan(plan, plan.seed)
    assert plan.pseudo_labels is not None
    assert changed.pseudo_labels is not None
    assert not getattr(changed.pseudo_labels.sources, key)
    kept = {key: getattr(plan.pseudo_labels.sources, key)}
    restored = changed.pseudo_labels.model_copy(
        update={"sources": changed.pseudo_labels.sources.model_copy(update=kept)}
    )
    assert changed.model_copy(update={"pseudo_labels": restored}) == plan
    assert plan_from_json(changed.canonical_json()) == changed


def test_the_papers_arm_has_the_papers_pseudo_labels_and_loss() -> None:
    plan = tiny_plan(*EVIDENCE)
    paper = arm_of("federated-paper", plan).plan(plan, plan.seed)
    assert paper == tiny_plan("pseudo_labels.schedule=decay")


def test_arms_about_evidence_say_what_the_plan_lacks() -> None:
    with pytest.raises(ConfigError, match=r"the plan's pseudo-labels are not by evidence, but by semisam\+"):
        arm_of("federated-paper", tiny_plan())
    with pytest.raises(ConfigError, match="the plan's sources have no prototypes"):
        arm_of("federated-without-prototypes", tiny_plan("pseudo_labels.method=evidence"))


def test_an_oracle_clicks_where_the_generalist_takes_clicks_and_draws_boxes_elsewhere() -> None:
    plan = tiny_plan(
        "pseudo_labels.generalists=[lite-medsam, sam, sam-med3d]",
        "pseudo_labels.prompting.strategy=uncertainty-rectified",
    )
    available = frozenset({"lite-medsam", "sam"})
    assert [arm.name for arm in oracle_arms(plan, available)] == [
        "oracle-lite-medsam-boxes",
        "oracle-sam-1-point",
        "oracle-sam-3-points",
        "oracle-sam-5-points",
        "oracle-sam-10-points",
    ]


def test_only_generalists_without_a_click_oracle_get_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_loader(*_: object) -> Generalist:
        raise WeightsError("must not be loaded")

    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    masked = replace(CARD, name="masked", prompt_kinds=frozenset({PromptKind.MASK_2D}))
    registry.register(GeneralistSpec(masked, no_loader, packaged=True))
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam, sam, sam-med3d, masked]")
    available = frozenset({"lite-medsam", "sam", "masked"})
    assert oracle_omissions(plan, available) == (
        "lite-medsam has no oracle with 1, 3, 5 and 10 points, since it takes no points; it gets boxes.",
        "sam-med3d has no oracle: no site with validation cases has it.",
        "masked has no oracle, since it takes neither points nor boxes.",
    )
    assert {arm.generalist for arm in oracle_arms(plan, available)} == {"lite-medsam", "sam"}
    assert oracle_omissions(tiny_plan("pseudo_labels=null"), available) == ()


LISTED = {"beta": ["x"], "alpha": ["a", "b", "c"]}


def test_a_label_count_is_one_for_all_sites_or_one_per_site_in_name_order() -> None:
    assert label_counts("all", LISTED) == {"alpha": 3, "beta": 1}
    assert label_counts("1", LISTED) == {"alpha": 1, "beta": 1}
    assert label_counts("2,0", LISTED) == {"alpha": 2, "beta": 0}


@pytest.mark.parametrize(
    ("setting", "says"),
    [("2", "beta lists only 1 labeled cases"), ("1,1,1", "one number, or 2: one each for alpha, beta")],
)
def test_label_counts_that_do_not_fit_are_refused(setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        label_counts(setting, LISTED)


def test_options_become_keys_of_the_definition_and_omitted_ones_do_not() -> None:
    assert definition_changes("a-b, c-d", None, "0,2", ["1,0", "all"], False, "in-process") == {
        "arms": ["a-b", "c-d"],
        "seeds": [0, 2],
        "labeled": ["1,0", "all"],
        "oracles": False,
    }
    assert definition_changes(None, None, None, None, None, "in-process") == {}


def test_invalid_seeds_and_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="--seeds 1;2: expected numbers separated by commas"):
        definition_changes(None, None, "1;2", None, None, "in-process")
    with pytest.raises(ConfigError, match="--engine flower: accepted: in-process"):
        definition_changes(None, None, None, None, None, "flower")
