"""The region of a class follows the teacher's channel of that class, and the plan's word on whether it is connected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semisam_core.plan import Plan
from semisam_core.prompting import Refusal, Region
from semisam_core.pseudo_labels.policy import claims_of, policy_of, region_of_class
from tests.semisam_core.pseudo_labels.scenes import FIRST, SECOND, TWO_CLASSES, cuboid, plain_plan, teacher_of

CONNECTED = "task.classes=[{name: first, value: 1}, {name: second, value: 2, connected: true}]"
ISLAND = (slice(1, 8), slice(12, 19), slice(8, 13))


def _region(teacher: torch.Tensor, k: int, plan: Plan) -> Region | Refusal:
    return region_of_class(teacher[k], k, plan, claims_of(teacher[1:], plan))


def test_a_class_is_prompted_by_its_own_channel_and_the_others_are_foreign() -> None:
    teacher = teacher_of(cuboid(FIRST), cuboid(SECOND))
    for k, (own, other) in enumerate([(FIRST, SECOND), (SECOND, FIRST)], start=1):
        region = _region(teacher, k, plain_plan(TWO_CLASSES))
        assert isinstance(region, Region)
        assert np.array_equal(region.mask, cuboid(own).numpy() > 0)
        assert np.array_equal(region.others, cuboid(other).numpy() > 0)


def test_the_background_channel_is_no_foreign_foreground() -> None:
    teacher = torch.cat([torch.ones(1, *cuboid(FIRST).shape), cuboid(FIRST)[None]])
    region = _region(teacher, 1, plain_plan())
    assert isinstance(region, Region)
    assert not region.others.any()


def test_a_false_island_prompts_unless_the_plan_calls_the_class_connected() -> None:
    teacher = teacher_of(cuboid(FIRST), cuboid(SECOND, ISLAND))
    prompted = {}
    for classes in (TWO_CLASSES, CONNECTED):
        region = _region(teacher, 2, plain_plan(classes))
        assert isinstance(region, Region)
        prompted[classes] = region.mask
        assert np.array_equal(region.others, cuboid(FIRST).numpy() > 0)  # what is left out of it is not foreign
    assert np.array_equal(prompted[TWO_CLASSES], cuboid(SECOND, ISLAND).numpy() > 0)
    assert np.array_equal(prompted[CONNECTED], cuboid(SECOND).numpy() > 0)


def test_each_class_has_its_own_connectedness() -> None:
    teacher = teacher_of(cuboid(FIRST, ISLAND), cuboid(SECOND))
    region = _region(teacher, 1, plain_plan(CONNECTED))
    assert isinstance(region, Region)
    assert np.array_equal(region.mask, cuboid(FIRST, ISLAND).numpy() > 0)
    assert not region.connected


def test_a_class_that_the_teacher_does_not_see_has_no_region() -> None:
    teacher = teacher_of(cuboid(FIRST), 0 * cuboid(FIRST))
    assert _region(teacher, 2, plain_plan(TWO_CLASSES)) is Refusal.EMPTY


def test_a_plan_without_pseudo_labels_has_no_policy() -> None:
    with pytest.raises(ValueError, match="no pseudo_labels section"):
        policy_of(plain_plan("pseudo_labels=null"))
