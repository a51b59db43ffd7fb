"""From a prediction to the region that prompts: thresholded, without specks, of plausible volume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semisam_core.plan_sections.pseudo_labels import Gates, Prompting
from semisam_core.prompting import Refusal, Region, find_region
from semisam_core.prompting.region import MAXIMUM_PARTS

SPACING = (2.0, 1.0, 4.0)
OPEN = Gates(minimum_volume_ml=0.0, maximum_volume_ml=1e6)


def _cuboid(low: tuple[int, int, int], high: tuple[int, int, int], value: float = 0.9) -> torch.Tensor:
    probability = torch.full((20, 18, 12), 0.1)
    probability[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = value
    return probability


def _find(
    probability: torch.Tensor, gates: Gates = OPEN, others: torch.Tensor | None = None, connected: bool = False
) -> Region | Refusal:
    return find_region(probability, SPACING, Prompting(), gates, others, connected)


def test_the_region_is_everything_above_the_threshold() -> None:
    probability = _cuboid((3, 4, 2), (9, 12, 5))
    region = _find(probability)
    assert isinstance(region, Region)
    assert np.array_equal(region.mask, (probability > 0.5).numpy())
    assert not region.others.any()


def test_a_low_probability_everywhere_is_not_foreground() -> None:
    assert _find(torch.full((20, 18, 12), 0.49)) is Refusal.EMPTY


ISLAND = ((12, 2, 8), (17, 8, 11))  # 168 voxels, beside 252 in the cuboid below


def test_a_large_island_prompts_unless_the_class_is_connected() -> None:
    target = _cuboid((3, 4, 2), (9, 12, 5))
    both = torch.maximum(target, _cuboid(*ISLAND))
    several, single = _find(both), _find(both, connected=True)
    assert isinstance(several, Region)
    assert isinstance(single, Region)
    assert np.array_equal(several.mask, (both > 0.5).numpy())
    assert np.array_equal(single.mask, (target > 0.5).numpy())
    assert (several.connected, single.connected) == (False, True)


def test_the_volume_of_a_connected_class_is_that_of_its_largest_component() -> None:
    both = torch.maximum(_cuboid((3, 4, 2), (9, 12, 5)), _cuboid(*ISLAND))
    between = Gates(minimum_volume_ml=0.0, maximum_volume_ml=300 * 8 / 1000)
    assert _find(both, between) is Refusal.TOO_LARGE
    assert isinstance(_find(both, between, connected=True), Region)


def test_specks_do_not_prompt() -> None:
    target = _cuboid((3, 4, 2), (9, 12, 5))
    speck = torch.maximum(target, _cuboid((17, 15, 10), (18, 16, 11)))
    region = _find(speck)
    assert isinstance(region, Region)
    assert np.array_equal(region.mask, (target > 0.5).numpy())


def test_the_other_classes_foreground_is_kept_apart() -> None:
    others = _cuboid((3, 4, 2), (12, 12, 5)) > 0.5
    region = _find(_cuboid((3, 4, 2), (9, 12, 5)), others=others)
    assert isinstance(region, Region)
    assert region.others.any()
    assert not (region.others & region.mask).any()


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        (Gates(minimum_volume_ml=100.0, maximum_volume_ml=200.0), Refusal.TOO_SMALL),
        (Gates(minimum_volume_ml=0.0, maximum_volume_ml=0.1), Refusal.TOO_LARGE),
    ],
)
def test_a_region_of_implausible_volume_is_refused(gates: Gates, reason: Refusal) -> None:
    assert _find(_cuboid((3, 4, 2), (9, 12, 5)), gates) is reason


def test_volumes_are_in_millilitres() -> None:
    one_voxel_ml = 2 * 1 * 4 / 1000
    probability = _cuboid((3, 4, 2), (4, 5, 2))  # four voxels
    just_under = Gates(minimum_volume_ml=4 * one_voxel_ml - 1e-6, maximum_volume_ml=10)
    just_over = Gates(minimum_volume_ml=4 * one_voxel_ml + 1e-6, maximum_volume_ml=10)
    assert isinstance(_find(probability, just_under), Region)
    assert _find(probability, just_over) is Refusal.TOO_SMALL


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), margin=st.floats(-30, 30))
def test_a_grown_region_follows_the_distance_in_millimetres_and_never_vanishes(seed: int, margin: float) -> None:
    mask = ndimage.binary_opening(np.random.default_rng(seed).random((14, 12, 8)) > 0.3)
    mask[5:8, 5:8, 3:5] = True
    region = Region(mask, np.zeros_like(mask), SPACING, connected=True).grown(margin)
    moved = region.mask
    assert moved.any()
    assert region.connected
    if margin >= 0:
        assert (mask <= moved).all()
        far = ndimage.distance_transform_edt(~mask, sampling=SPACING)
        assert far[moved].max() <= margin
    else:
        assert (moved <= mask).all()


def test_a_margin_reaches_fewer_voxels_along_an_axis_of_larger_ones() -> None:
    mask = np.zeros((15, 15, 15), bool)
    mask[7, 7, 7] = True
    grown = Region(mask, np.zeros_like(mask), SPACING).grown(4.0).mask
    reach = [np.flatnonzero(grown.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    assert [int(voxels[-1]) - 7 for voxels in reach] == [2, 4, 1]


def test_a_region_has_a_part_per_component_unless_it_is_connected() -> None:
    mask = np.zeros((30, 6, 4), bool)
    for row in range(0, 30, 3):
        mask[row, 1:4, 1] = True
    mask[0, 1:4, 2] = True
    region = Region(mask, np.zeros_like(mask), SPACING)
    parts = list(region.parts())
    assert len(parts) == MAXIMUM_PARTS
    assert np.flatnonzero(parts[0].mask.any((1, 2))).tolist() == [0]  # the largest
    assert [each.mask is mask for each in Region(mask, region.others, SPACING, connected=True).parts()] == [True]
