"""Depths, clicks and grown regions are those of scipy's distance transform over the whole scan, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from semisam_core.components import Mask
from semisam_core.prompting import Region, depth
from semisam_core.prompting.clicks import deepest_voxel, next_click
from semisam_core.prompting.depth import BorderDistances

SPACINGS = st.sampled_from([(1.0, 1.0, 1.0), (0.7, 2.3, 1.1), (3.3, 0.5, 0.5)])


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "BLOCK", 200)
        yield


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Return a mask of some pieces, away from most borders of its array."""
    shape = draw(st.tuples(*[st.integers(3, 14)] * 3))
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    smooth = ndimage.gaussian_filter(random.normal(size=shape), draw(st.sampled_from([0.0, 1.0, 2.0])))
    mask: Mask = smooth > np.quantile(smooth, draw(st.sampled_from([0.3, 0.8, 0.97])))
    mask[draw(st.integers(1, shape[0])) :] = False
    mask[0, 0, 0] |= not mask.any()
    return mask


def _deepest(mask: Mask, spacing: tuple[float, ...]) -> tuple[int, ...]:
    inner = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    deepest: NDArray[np.int64] = np.argwhere(inner >= inner.max() - 1e-9)
    apart = (((deepest - np.argwhere(mask).mean(0)) * spacing) ** 2).sum(1)
    return tuple(int(index) for index in deepest[apart.argmin()])


def _largest(mask: Mask) -> Mask:
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == labels.ravel()[sizes[labels].argmax()] if mask.any() else mask


@settings(deadline=None)
@given(mask=masks(), spacing=SPACINGS)
def test_distances(mask: Mask, spacing: tuple[float, float, float]) -> None:
    found = np.concatenate([rows for _, rows in BorderDistances(mask, spacing)])
    assert np.array_equal(found, ndimage.distance_transform_edt(mask, sampling=spacing))


@settings(deadline=None)
@given(mask=masks(), spacing=SPACINGS, margin=st.sampled_from([-6.0, -2.0, -0.7, 0.0, 0.5, 3.0, 8.0]))
def test_a_grown_region(mask: Mask, spacing: tuple[float, float, float], margin: float) -> None:
    others = np.roll(mask, 1, 0) & ~mask
    if margin > 0:
        moved = ndimage.distance_transform_edt(~mask, sampling=spacing) <= margin
    else:
        inside = ndimage.distance_transform_edt(mask, sampling=spacing)
        moved = inside > min(-margin, inside.max() / 2)
    grown = Region(mask, others, spacing).grown(margin)
    assert np.array_equal(grown.mask, moved if margin else mask)
    assert np.array_equal(grown.others, others & ~grown.mask)


@settings(deadline=None)
@given(mask=masks(), spacing=SPACINGS)
def test_the_deepest_voxel(mask: Mask, spacing: tuple[float, float, float]) -> None:
    assert deepest_voxel(mask, spacing) == _deepest(mask, spacing)


@settings(deadline=None)
@given(region=masks(), spacing=SPACINGS, shift=st.integers(-3, 3))
def test_the_next_click(region: Mask, spacing: tuple[float, float, float], shift: int) -> None:
    answer = np.roll(region, shift, 1)
    missing, wrong = _largest(region & ~answer), _largest(answer & ~region)
    found = next_click(answer, region, spacing)
    if not missing.any() and not wrong.any():
        assert found is None
    elif missing.sum() >= wrong.sum():
        assert found == (_deepest(missing, spacing), True)
    else:
        assert found == (_deepest(wrong, spacing), False)
