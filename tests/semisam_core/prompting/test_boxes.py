"""Boxes around a region, slice by slice, smoothed along the slices."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.prompting import Region
from semisam_core.prompting.boxes import slice_bounds, slice_boxes, smooth_bounds

SPACING = (2.0, 2.0, 4.0)


def _cuboid(low: tuple[int, int, int], high: tuple[int, int, int]) -> Region:
    mask = np.zeros((20, 18, 12), bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    return Region(mask, np.zeros_like(mask), SPACING)


def test_boxes_are_the_inclusive_bounds_of_the_region() -> None:
    boxes = slice_boxes(_cuboid((3, 4, 2), (9, 12, 5)), 0.0, 1)
    assert [box.index for box in boxes] == [2, 3, 4, 5]
    assert {box.bounds for box in boxes} == {(3.0, 4.0, 9.0, 12.0)}


@settings(deadline=None, max_examples=25)
@given(shift=st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(0, 5)))
def test_boxes_move_with_the_region(shift: tuple[int, int, int]) -> None:
    high = (shift[0] + 5, shift[1] + 6, shift[2] + 3)
    boxes = slice_boxes(_cuboid(shift, high), 0.0, 1)
    assert boxes[0].index == shift[2]
    assert boxes[0].bounds == (shift[0], shift[1], high[0], high[1])


def test_a_margin_is_in_millimetres() -> None:
    region = _cuboid((3, 4, 2), (9, 12, 5))
    bounds = [slice_boxes(region, margin, 1)[0].bounds for margin in (-2.0, 0.0, 4.0)]
    assert bounds == [(4, 5, 8, 11), (3, 4, 9, 12), (1, 2, 11, 14)]


@settings(deadline=None, max_examples=25)
@given(margin=st.floats(-100, 100), side=st.integers(0, 6))
def test_a_box_never_turns_inside_out_nor_leaves_the_scan(margin: float, side: int) -> None:
    for box in slice_boxes(_cuboid((3, 4, 2), (3 + side, 4 + side, 4)), margin, 1):
        top, left, bottom, right = box.bounds
        assert 0 <= top <= bottom <= 19
        assert 0 <= left <= right <= 17


def test_one_bad_slice_moves_no_box() -> None:
    region = _cuboid((3, 4, 0), (9, 12, 10))
    region.mask[0:18, 0:17, 5] = True
    assert {box.bounds for box in slice_boxes(region, 0.0, 5)} == {(3.0, 4.0, 9.0, 12.0)}


def test_smoothing_does_not_reach_across_a_gap_in_the_slices() -> None:
    slices = np.array([1, 2, 3, 8, 9, 10])
    bounds = np.array([[1.0] * 4] * 3 + [[9.0] * 4] * 3)
    assert np.array_equal(smooth_bounds(slices, bounds, 5), bounds)


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
