"""From a prediction to boxes: binarised, plausible, one component after another, smoothed along the slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.generalists.base import PromptKind
from semisam_core.plan import Gates, Prompting
from semisam_core.prompting import (
    PromptSets,
    Refusal,
    make_prompts,
    meaningful_components,
    slice_bounds,
    smooth_bounds,
)

SPACING = (2.0, 2.0, 4.0)
OPEN = Gates(minimum_volume_ml=0.0, maximum_volume_ml=1e6)
EXACT = Prompting(margins_mm=(0.0,), smooth_slices=1)


def _cuboid(low: tuple[int, int, int], high: tuple[int, int, int], value: float = 0.9) -> torch.Tensor:
    probability = torch.full((20, 18, 12), 0.1)
    probability[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = value
    return probability


def _sets(probability: torch.Tensor, prompting: Prompting = EXACT, gates: Gates = OPEN) -> PromptSets:
    prompts = make_prompts(probability, SPACING, prompting, gates)
    assert isinstance(prompts, PromptSets)
    return prompts


def test_boxes_are_the_inclusive_bounds_of_what_exceeds_the_threshold() -> None:
    boxes = _sets(_cuboid((3, 4, 2), (9, 12, 5))).sets[0].boxes
    assert [box.index for box in boxes] == [2, 3, 4, 5]
    assert {box.bounds for box in boxes} == {(3.0, 4.0, 9.0, 12.0)}


def test_a_low_probability_everywhere_is_not_foreground() -> None:
    assert make_prompts(torch.full((20, 18, 12), 0.49), SPACING, EXACT, OPEN) is Refusal.EMPTY


@settings(deadline=None, max_examples=25)
@given(shift=st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(0, 5)))
def test_prompts_move_with_the_prediction(shift: tuple[int, int, int]) -> None:
    low = tuple(int(each) for each in shift)
    high = (low[0] + 5, low[1] + 6, low[2] + 3)
    boxes = _sets(_cuboid((low[0], low[1], low[2]), high)).sets[0].boxes
    assert boxes[0].index == low[2]
    assert boxes[0].bounds == (low[0], low[1], high[0], high[1])


def test_each_margin_is_a_prompt_set_in_millimetres_on_the_same_slices() -> None:
    prompting = Prompting(margins_mm=(-2.0, 0.0, 4.0), smooth_slices=1)
    sets = _sets(_cuboid((3, 4, 2), (9, 12, 5)), prompting).sets
    assert [each.boxes[0].bounds for each in sets] == [(4, 5, 8, 11), (3, 4, 9, 12), (1, 2, 11, 14)]
    assert len({tuple(box.index for box in each.boxes) for each in sets}) == 1


@settings(deadline=None, max_examples=25)
@given(margin=st.floats(-100, 100), side=st.integers(0, 6))
def test_a_box_never_turns_inside_out_nor_leaves_the_scan(margin: float, side: int) -> None:
    prompting = Prompting(margins_mm=(margin,), smooth_slices=1)
    for box in _sets(_cuboid((3, 4, 2), (3 + side, 4 + side, 4)), prompting).sets[0].boxes:
        top, left, bottom, right = box.bounds
        assert 0 <= top <= bottom <= 19
        assert 0 <= left <= right <= 17


def test_one_bad_slice_moves_no_box() -> None:
    probability = _cuboid((3, 4, 0), (9, 12, 10))
    probability[0:18, 0:17, 5] = 0.9
    boxes = _sets(probability, Prompting(margins_mm=(0.0,), smooth_slices=5)).sets[0].boxes
    assert {box.bounds for box in boxes} == {(3.0, 4.0, 9.0, 12.0)}


def test_smoothing_does_not_reach_across_a_gap_in_the_slices() -> None:
    slices = np.array([1, 2, 3, 8, 9, 10])
    bounds = np.array([[1.0] * 4] * 3 + [[9.0] * 4] * 3)
    assert np.array_equal(smooth_bounds(slices, bounds, 5), bounds)


def test_specks_are_ignored_and_large_parts_are_kept() -> None:
    mask = np.zeros((20, 20, 10), bool)
    mask[2:8, 2:8, 2:8] = True
    mask[12:17, 12:17, 2:8] = True
    mask[0, 19, 9] = True
    kept = meaningful_components(mask, 0.3)
    assert kept.sum() == mask.sum() - 1


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        (Gates(minimum_volume_ml=100.0, maximum_volume_ml=200.0), Refusal.TOO_SMALL),
        (Gates(minimum_volume_ml=0.0, maximum_volume_ml=0.1), Refusal.TOO_LARGE),
    ],
)
def test_an_implausible_volume_gets_no_prompt(gates: Gates, reason: Refusal) -> None:
    assert make_prompts(_cuboid((3, 4, 2), (9, 12, 5)), SPACING, EXACT, gates) is reason


def test_volume_is_measured_in_millilitres() -> None:
    one_voxel_ml = 2 * 2 * 4 / 1000
    probability = _cuboid((3, 4, 2), (4, 5, 2))  # four voxels
    just_under = Gates(minimum_volume_ml=4 * one_voxel_ml - 1e-6, maximum_volume_ml=10)
    just_over = Gates(minimum_volume_ml=4 * one_voxel_ml + 1e-6, maximum_volume_ml=10)
    assert isinstance(make_prompts(probability, SPACING, EXACT, just_under), PromptSets)
    assert make_prompts(probability, SPACING, EXACT, just_over) is Refusal.TOO_SMALL


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_slice_bounds_contain_every_voxel_and_touch_each_side(seed: int) -> None:
    region = np.random.default_rng(seed).random((9, 8, 5)) > 0.9
    slices, bounds = slice_bounds(region)
    for index, (top, left, bottom, right) in zip(slices, bounds.astype(int), strict=True):
        inside = region[top : bottom + 1, left : right + 1, index]
        assert inside.sum() == region[:, :, index].sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


def test_a_kind_of_prompt_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(ValueError, match="points-3d cannot be made"):
        make_prompts(_cuboid((3, 4, 2), (9, 12, 5)), SPACING, Prompting(kind=PromptKind.POINTS_3D), OPEN)
