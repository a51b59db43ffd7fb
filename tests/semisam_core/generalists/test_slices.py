"""How slices, boxes, clicks and answers map to the square input of a 2D encoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.generalists.base import Point, SliceBox
from semisam_core.generalists.slices import Framing, stretch

SIDES = st.integers(4, 600)
framing = Framing(256)
STRETCHED = Framing(256, stretched=True)


@settings(deadline=None, max_examples=25)
@given(height=SIDES, width=SIDES)
def test_a_slice_fills_the_frame_along_its_longer_side_and_keeps_its_proportions(height: int, width: int) -> None:
    rows, columns = framing.size((height, width))
    assert max(rows, columns) == framing.side
    assert min(rows, columns) >= 1
    assert abs(min(rows, columns) - framing.side * min(height, width) / max(height, width)) <= 0.5
    assert framing.box(SliceBox(0, (0, 0, height - 1, width - 1)), (height, width, 1)) == (0, 0, columns, rows)


@settings(deadline=None, max_examples=25)
@given(height=SIDES, width=SIDES, data=st.data())
def test_the_edges_of_a_box_are_at_the_same_fraction_of_slice_and_frame(height: int, width: int, data: Any) -> None:
    top, bottom = sorted(data.draw(st.tuples(*[st.floats(0, height - 1)] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.floats(0, width - 1)] * 2)))
    rows, columns = framing.size((height, width))
    found = framing.box(SliceBox(0, (top, left, bottom, right)), (height, width, 1))
    shares = (left / width, top / height, (right + 1) / width, (bottom + 1) / height)
    assert found == pytest.approx([a * b for a, b in zip(shares, (columns, rows, columns, rows), strict=True)])
    turned = framing.box(SliceBox(0, (left, top, right, bottom)), (width, height, 1))
    assert turned == pytest.approx((found[1], found[0], found[3], found[2]))


@pytest.mark.parametrize(
    ("box", "says"),
    [
        (SliceBox(3, (0, 0, 5, 5)), "slice 3; this scan has slices 0 to 2"),
        (SliceBox(0, (0, 0, math.nan, 5)), "not finite"),
        (SliceBox(0, (6, 0, 5, 5)), r"is empty; bounds are \(row_min, column_min, row_max, column_max\)"),
        (SliceBox(1, (20, 0, 25, 5)), "lies outside the 20 x 30 slice"),
    ],
)
def test_a_box_without_any_voxel_of_the_scan_is_refused(box: SliceBox, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        framing.box(box, (20, 30, 3))


@settings(deadline=None, max_examples=50)
@given(height=SIDES, width=SIDES, stretched=st.booleans(), data=st.data())
def test_a_click_on_a_voxel_is_inside_the_box_around_that_voxel(
    height: int, width: int, stretched: bool, data: Any
) -> None:
    frame = Framing(256, stretched)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    x, y = frame.point(Point((row, column, 0)), (height, width, 1))
    left, top, right, bottom = frame.box(SliceBox(0, (row, column, row, column)), (height, width, 1))
    assert (x, y) == pytest.approx(((left + right) / 2, (top + bottom) / 2))


@settings(deadline=None, max_examples=25)
@given(height=st.integers(16, 300), width=st.integers(16, 300), stretched=st.booleans(), data=st.data())
def test_a_spot_at_a_voxel_is_framed_at_its_click_and_maps_back_to_the_voxel(
    height: int, width: int, stretched: bool, data: Any
) -> None:
    frame = Framing(256, stretched)
    row, column = data.draw(st.integers(4, height - 5)), data.draw(st.integers(4, width - 5))
    slices = torch.zeros(1, height, width)
    slices[0, row - 4 : row + 5, column - 4 : column + 5] = 1.0
    framed = frame.pad(frame.frames(slices))
    rows, columns = torch.meshgrid(torch.arange(256) + 0.5, torch.arange(256) + 0.5, indexing="ij")
    mass = framed[0] / framed.sum()
    centre = (float((mass * columns).sum()), float((mass * rows).sum()))
    # Resampling with few pixels per voxel moves a centre of mass by a fraction of a pixel.
    assert centre == pytest.approx(frame.point(Point((row, column, 0)), (height, width, 1)), abs=0.6)
    back = frame.unframe(framed, (height, width))[0]
    assert float(back[row, column]) > 0.5
    outside = back.clone()
    outside[max(0, row - 9) : row + 10, max(0, column - 9) : column + 10] = 0
    assert float(outside.max()) < 0.5


def test_a_mask_prompt_has_the_requested_resolution_and_padding() -> None:
    low = framing.mask(torch.ones(2, 40, 20), 64, outside=-9.0)
    assert tuple(low.shape) == (2, 1, 64, 64)
    assert bool((low[:, :, :, :32] == 1).all())
    assert bool((low[:, :, :, 32:] == -9).all())
    assert bool((STRETCHED.mask(torch.ones(1, 40, 20), 64, outside=-9.0) == 1).all())


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ((0, 0, 1.5), "whole slice"),
        ((20, 0, 0), "outside"),
        ((0, -1, 0), "outside"),
        ((0, 0, math.nan), "outside"),
    ],
)
def test_a_click_off_the_voxels_of_a_slice_is_refused(position: tuple[float, float, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        framing.point(Point(position), (20, 30, 3))


def test_each_frame_is_stretched_separately_and_a_constant_one_is_black() -> None:
    frames = torch.stack([torch.arange(4.0).reshape(2, 2), torch.full((2, 2), 7.0)])
    assert stretch(frames).tolist() == [[[0, pytest.approx(1 / 3)], [pytest.approx(2 / 3), 1]], [[0, 0], [0, 0]]]
