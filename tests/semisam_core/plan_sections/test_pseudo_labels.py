"""The plan's section on pseudo-labels: its loss, and which keys leave older plans' hashes alone."""

from __future__ import annotations

import json

import pytest

from semisam_core.configuration import override, parse
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan
from tests.conftest import TINY_PLAN, tiny_plan

LATER = ["window_overlap=0.25", "ramp_share=0.33", "loss={squared: 1.0, cross_entropy: 0.0, dice: 0.0}"]
CHANGED = ["window_overlap=0.5", "ramp_share=0.5", "loss.dice=0.5", "schedule=ramp-up"]


@pytest.mark.parametrize("assignment", LATER)
def test_the_default_of_a_later_key_leaves_the_hash_of_older_plans_alone(assignment: str) -> None:
    assert tiny_plan(f"pseudo_labels.{assignment}").hash == tiny_plan().hash
    assert assignment.partition("=")[0] not in json.loads(tiny_plan().canonical_json())["pseudo_labels"]


@pytest.mark.parametrize("assignment", CHANGED)
def test_any_other_value_is_part_of_the_plan(assignment: str) -> None:
    plan = tiny_plan(f"pseudo_labels.{assignment}")
    assert plan.hash != tiny_plan().hash
    assert Plan.model_validate_json(plan.canonical_json()) == plan


def test_a_loss_without_any_part_is_refused() -> None:
    nothing = override(TINY_PLAN, ["pseudo_labels.loss.squared=0"])
    with pytest.raises(ConfigError, match="at least one of squared, cross_entropy and dice must be above 0"):
        parse(Plan, nothing, "plan.yaml")
