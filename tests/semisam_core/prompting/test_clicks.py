"""Clicks: in the largest error, deep inside it, of the right sign; none where nothing is wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from semisam_core.prompting.clicks import deepest_voxel, next_click, scribble

SPACING = (1.0, 2.0, 3.0)
SHAPE = (10, 9, 8)
SEEDS = st.integers(0, 10_000)


def _blobs(seed: int) -> NDArray[np.bool_]:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 1.5)
    return noise > np.quantile(noise, 0.8)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_the_deepest_voxel_is_farther_from_the_border_than_any_other(seed: int) -> None:
    mask = _blobs(seed)
    outside = np.argwhere(~np.pad(mask, 1)) - 1

    def depth(voxel: NDArray[np.int64]) -> float:
        return float(np.sqrt((((outside - voxel) * SPACING) ** 2).sum(1)).min())

    found = np.array(deepest_voxel(mask, SPACING))
    assert mask[tuple(found)]
    assert depth(found) == pytest.approx(max(depth(voxel) for voxel in np.argwhere(mask)))


@settings(deadline=None, max_examples=50)
@given(first=SEEDS, second=SEEDS)
def test_a_click_lies_in_the_error_and_its_sign_says_what_the_specialist_says_there(first: int, second: int) -> None:
    answer, region = _blobs(first), _blobs(second)
    click = next_click(answer, region, SPACING)
    if click is None:
        assert np.array_equal(answer, region)
        return
    position, positive = click
    assert answer[position] != region[position]
    assert positive == bool(region[position])


def test_the_first_click_is_inside_the_object_and_positive() -> None:
    region = _blobs(1)
    click = next_click(np.zeros(SHAPE, bool), region, SPACING)
    assert click is not None
    assert click[1]
    assert region[click[0]]


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_clicks_turn_with_the_scan(axes: tuple[int, ...]) -> None:
    region = np.zeros(SHAPE, bool)
    region[1:6, 3:6, 2:5] = True
    click = next_click(np.zeros(SHAPE, bool), region, SPACING)
    turned_region = region.transpose(axes)
    turned_spacing = [SPACING[axis] for axis in axes]
    turned = next_click(np.zeros(turned_region.shape, bool), turned_region, turned_spacing)
    assert click is not None
    assert turned is not None
    assert turned[0] == tuple(click[0][axis] for axis in axes)


def test_the_largest_error_is_clicked_first() -> None:
    region, answer = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    region[1:3, 1:3, 1:3] = True  # missed: 8 voxels
    answer[5:8, 5:8, 5:8] = True  # too much: 27 voxels
    assert next_click(answer, region, SPACING) == ((6, 6, 6), False)


def test_where_generalist_and_specialist_agree_there_is_no_next_click() -> None:
    assert next_click(_blobs(3), _blobs(3), SPACING) is None


def test_an_empty_mask_cannot_be_clicked_on() -> None:
    with pytest.raises(ValueError, match="empty mask"):
        deepest_voxel(np.zeros(SHAPE, bool), SPACING)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, count=st.integers(1, 12), flat=st.booleans())
def test_a_scribble_stays_inside_and_has_no_more_points_than_asked_for(seed: int, count: int, flat: bool) -> None:
    mask = _blobs(seed)
    mask = mask[:, :, int(mask.sum((0, 1)).argmax())] if flat else mask
    points = scribble(mask, count)
    assert 1 <= len(points) <= count
    assert len(set(points)) == len(points)
    assert all(mask[point] for point in points)


def test_a_scribble_reaches_both_ends_of_a_thin_target() -> None:
    mask = np.zeros((40, 40), bool)
    for k in range(5, 35):
        mask[k - 1 : k + 2, k - 1 : k + 2] = True  # a diagonal vessel
    rows = sorted(row for row, _ in scribble(mask, 4))
    assert rows[0] <= 8
    assert rows[-1] >= 31
