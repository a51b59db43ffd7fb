"""From a prediction to what can be prompted with: binarised, meaningful, plausible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from semisam_core.plan_sections.pseudo_labels import Gates, Prompting
from semisam_core.prompting import Refusal, Region, find_region, meaningful_components

SPACING = (2.0, 2.0, 4.0)
OPEN = Gates(minimum_volume_ml=0.0, maximum_volume_ml=1e6)


def _cuboid(low: tuple[int, int, int], high: tuple[int, int, int], value: float = 0.9) -> torch.Tensor:
    probability = torch.full((20, 18, 12), 0.1)
    probability[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = value
    return probability


def _find(probability: torch.Tensor, gates: Gates = OPEN, others: torch.Tensor | None = None) -> Region | Refusal:
    return find_region(probability, SPACING, Prompting(), gates, others)


def test_the_region_is_what_exceeds_the_threshold() -> None:
    probability = _cuboid((3, 4, 2), (9, 12, 5))
    region = _find(probability)
    assert isinstance(region, Region)
    assert np.array_equal(region.mask, (probability > 0.5).numpy())
    assert not region.others.any()


def test_a_low_probability_everywhere_is_not_foreground() -> None:
    assert _find(torch.full((20, 18, 12), 0.49)) is Refusal.EMPTY


def test_specks_are_ignored_and_large_parts_are_kept() -> None:
    mask = np.zeros((20, 20, 10), bool)
    mask[2:8, 2:8, 2:8] = True
    mask[12:17, 12:17, 2:8] = True
    mask[0, 19, 9] = True
    kept = meaningful_components(mask, 0.3)
    assert kept.sum() == mask.sum() - 1


def test_what_other_classes_claim_is_kept_apart() -> None:
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
def test_an_implausible_volume_gets_no_prompt(gates: Gates, reason: Refusal) -> None:
    assert _find(_cuboid((3, 4, 2), (9, 12, 5)), gates) is reason


def test_volume_is_measured_in_millilitres() -> None:
    one_voxel_ml = 2 * 2 * 4 / 1000
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
    moved = Region(mask, np.zeros_like(mask), SPACING).grown(margin).mask
    assert moved.any()
    if margin >= 0:
        assert (mask <= moved).all()
        far = ndimage.distance_transform_edt(~mask, sampling=SPACING)
        assert far[moved].max() <= margin
    else:
        assert (moved <= mask).all()
