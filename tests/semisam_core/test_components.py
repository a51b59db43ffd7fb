"""Components connect across faces, edges and corners, and are selected by size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from semisam_core import components
from semisam_core.components import largest_component, meaningful_components, separate_components


def _three_parts() -> np.ndarray:
    """Return a mask with components of 4, 12 and 6 voxels, in array order."""
    mask = np.zeros((12, 9, 5), bool)
    mask[0:2, 0:2, 0] = True
    mask[4:6, 1:4, 1:3] = True
    mask[8:11, 5:7, 4] = True
    return mask


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    diagonal = np.zeros((4, 4, 4), bool)
    diagonal[range(4), range(4), range(4)] = True
    assert np.array_equal(largest_component(diagonal), diagonal)
    assert len(list(separate_components(np.eye(5, dtype=bool), 0.0, 9))) == 1


def test_the_largest_component_is_kept_alone() -> None:
    mask = _three_parts()
    kept = largest_component(mask)
    assert kept.sum() == 12
    assert kept[4:6, 1:4, 1:3].all()


def test_of_equally_large_components_the_first_in_the_array_is_kept() -> None:
    mask = np.zeros((9, 3), bool)
    mask[1:3] = mask[5:7] = True
    assert np.flatnonzero(largest_component(mask).any(1)).tolist() == [1, 2]


def test_components_below_the_share_of_the_largest_are_dropped() -> None:
    mask = _three_parts()
    assert meaningful_components(mask, 0.5).sum() == 18
    assert meaningful_components(mask, 0.51).sum() == 12
    assert meaningful_components(mask, 0.0).sum() == 22


@pytest.mark.parametrize(
    ("share", "limit", "sizes"), [(0.0, 9, [12, 6, 4]), (0.0, 2, [12, 6]), (0.5, 9, [12, 6]), (1.0, 9, [12])]
)
def test_separate_components_come_largest_first(share: float, limit: int, sizes: list[int]) -> None:
    mask = _three_parts()
    parts = list(separate_components(mask, share, limit))
    assert [int(part.sum()) for part in parts] == sizes
    assert not any((part & ~mask).any() for part in parts)


def test_an_empty_mask_has_no_components() -> None:
    empty = np.zeros((3, 4, 5), bool)
    assert list(separate_components(empty, 0.3, 8)) == []
    assert not largest_component(empty).any()
    assert not meaningful_components(empty, 0.3).any()


@given(seed=st.integers(0, 9999), density=st.sampled_from([0.02, 0.1, 0.3]), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_components_within_their_box_are_those_of_the_whole_scan(seed: int, density: float, share: float) -> None:
    mask = np.zeros((12, 9, 7), bool)
    mask[2:9, 1:, :5] = np.random.default_rng(seed).random((7, 8, 5)) < density
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "_AT_ONCE", 50)
        first = labels.ravel()[sizes[labels].argmax()]
        assert np.array_equal(largest_component(mask), (labels == first) & mask)
        assert np.array_equal(meaningful_components(mask, share), (sizes >= share * sizes.max())[labels] & mask)
        order = np.argsort(-sizes[1:], kind="stable")[:3] + 1
        expected = [labels == number for number in order if sizes[number] >= share * sizes[order[0]]]
        found = list(separate_components(mask, share, 3))
        assert len(found) == len(expected)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
