"""Boxes around the components of each slice, smoothed along the slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.generalists.base import SliceBox
from semisam_core.prompting import Region
from semisam_core.prompting.boxes import follow_components, part_bounds, slice_boxes, smooth_bounds
from semisam_core.prompting.region import MAXIMUM_PARTS

SPACING = (1.0, 2.0, 4.0)
SHAPE = (20, 18, 12)


def _cuboids(
    *corners: tuple[tuple[int, int, int], tuple[int, int, int]], spacing_mm: tuple[float, float, float] = SPACING
) -> Region:
    """Return a region of cuboids, given by their first and last voxels."""
    mask = np.zeros(SHAPE, bool)
    for low, high in corners:
        mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    return Region(mask, np.zeros_like(mask), spacing_mm)


def _on(boxes: tuple[SliceBox, ...], index: int) -> list[tuple[float, float, float, float]]:
    return [box.bounds for box in boxes if box.index == index]


def test_boxes_are_the_inclusive_bounds_of_the_region() -> None:
    boxes = slice_boxes(_cuboids(((3, 4, 2), (9, 12, 5))), 0.0, 1)
    assert [box.index for box in boxes] == [2, 3, 4, 5]
    assert {box.bounds for box in boxes} == {(3.0, 4.0, 9.0, 12.0)}


@settings(deadline=None, max_examples=25)
@given(shift=st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(0, 5)))
def test_boxes_move_with_the_region(shift: tuple[int, int, int]) -> None:
    high = (shift[0] + 5, shift[1] + 6, shift[2] + 3)
    boxes = slice_boxes(_cuboids((shift, high)), 0.0, 1)
    assert boxes[0].index == shift[2]
    assert boxes[0].bounds == (shift[0], shift[1], high[0], high[1])


def test_a_margin_is_converted_by_the_voxel_size_of_each_axis() -> None:
    region = _cuboids(((5, 4, 2), (13, 12, 5)))  # 1 mm along rows, 2 mm along columns
    bounds = [slice_boxes(region, margin, 1)[0].bounds for margin in (-2.0, 0.0, 4.0)]
    assert bounds == [(7, 5, 11, 11), (5, 4, 13, 12), (1, 2, 17, 14)]


@settings(deadline=None, max_examples=25)
@given(margin=st.floats(-100, 100), side=st.integers(0, 6))
def test_no_margin_inverts_a_box_or_moves_it_off_the_slice(margin: float, side: int) -> None:
    for box in slice_boxes(_cuboids(((3, 4, 2), (3 + side, 4 + side, 4))), margin, 1):
        top, left, bottom, right = box.bounds
        assert 0 <= top <= bottom <= 19
        assert 0 <= left <= right <= 17


@pytest.mark.parametrize("connected", [True, False])
def test_a_single_bad_slice_moves_no_box(connected: bool) -> None:
    region = _cuboids(((3, 4, 0), (9, 12, 10)))
    region.mask[0:18, 0:17, 5] = True
    region = Region(region.mask, region.others, SPACING, connected)
    assert {box.bounds for box in slice_boxes(region, 0.0, 5)} == {(3.0, 4.0, 9.0, 12.0)}


def test_smoothing_does_not_reach_across_a_gap_in_the_slices() -> None:
    slices = np.array([1, 2, 3, 8, 9, 10])
    bounds = np.array([[1.0] * 4] * 3 + [[9.0] * 4] * 3)
    assert np.array_equal(smooth_bounds(slices, bounds, 5), bounds)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_bounds_contain_every_pixel_and_touch_each_side(seed: int) -> None:
    part = np.random.default_rng(seed).random((9, 8)) > 0.9
    part[4, 6] = True
    top, left, bottom, right = (int(bound) for bound in part_bounds(part))
    inside = part[top : bottom + 1, left : right + 1]
    assert inside.sum() == part.sum()
    assert inside[0].any()
    assert inside[-1].any()
    assert inside[:, 0].any()
    assert inside[:, -1].any()


APART = (((2, 1, 2), (8, 5, 7)), ((11, 9, 2), (16, 15, 7)))  # two cuboids on the same slices


def test_each_component_of_a_slice_has_its_own_box() -> None:
    boxes = slice_boxes(_cuboids(*APART), 0.0, 5, 0.3)
    for index in range(2, 8):
        assert _on(boxes, index) == [(2, 1, 8, 5), (11, 9, 16, 15)]


def test_a_connected_class_has_one_box_around_everything_on_a_slice() -> None:
    region = _cuboids(*APART)
    region.mask[2:16, 1:15, 8] = True  # joins the two above
    region = Region(region.mask, region.others, SPACING, connected=True)
    assert _on(slice_boxes(region, 0.0, 1, 0.3), 4) == [(2, 1, 16, 15)]


def test_a_component_below_the_share_has_no_box() -> None:
    region = _cuboids(APART[0], ((12, 10, 3), (14, 12, 4)))  # 9 of 35 pixels on slices 3 and 4
    assert _on(slice_boxes(region, 0.0, 1, 0.3), 3) == [(2, 1, 8, 5)]
    assert len(_on(slice_boxes(region, 0.0, 1, 0.2), 3)) == 2


def test_components_are_smoothed_separately() -> None:
    region = _cuboids(*APART)
    region.mask[11:17, 9:12, 5] = False  # a bad slice of the second one
    assert _on(slice_boxes(region, 0.0, 5), 5) == [(2, 1, 8, 5), (11, 9, 16, 15)]


def test_the_number_of_boxes_on_a_slice_is_bounded_and_the_largest_are_kept() -> None:
    mask = np.zeros((30, 30, 2), bool)
    for row in range(0, 30, 5):
        for column in range(0, 30, 5):
            mask[row : row + 2, column : column + 2] = True
    mask[25:29, 25:29] = True
    boxes = slice_boxes(Region(mask, np.zeros_like(mask), SPACING), 0.0, 1)
    assert [len(_on(boxes, index)) for index in range(2)] == [MAXIMUM_PARTS, MAXIMUM_PARTS]
    assert (25, 25, 28, 28) in _on(boxes, 0)


def test_where_components_merge_the_one_that_overlaps_more_goes_on() -> None:
    region = _cuboids(((2, 1, 2), (8, 8, 4)), ((11, 9, 2), (16, 15, 4)), ((2, 1, 5), (16, 15, 6)))
    tracks = follow_components(region.mask, 0.0)
    assert sorted(track.slices for track in tracks) == [[2, 3, 4], [2, 3, 4, 5, 6]]
    longest = max(tracks, key=lambda track: len(track.slices))
    assert longest.bounds[0] == (2, 1, 8, 8)
    assert longest.bounds[-1] == (2, 1, 16, 15)


def test_a_track_ends_at_a_slice_without_its_component() -> None:
    region = _cuboids(((2, 1, 2), (8, 8, 3)), ((2, 1, 5), (8, 8, 6)))
    assert [track.slices for track in follow_components(region.mask, 0.0)] == [[2, 3], [5, 6]]
