"""The threshold with the highest expected Dice, against trying every mask and against drawing the truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.evaluation import dice_of
from semisam_core.sources.threshold import NEGLIGIBLE, best_threshold, centred

SHAPE = (6, 5, 4)


def _maps(seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(SHAPE, generator=generator, dtype=torch.float64)


def _expected_dice(probability: Tensor, mask: Tensor) -> float:
    counted = probability[probability > NEGLIGIBLE]
    return 2 * float(probability[mask].sum()) / (int(mask.sum()) + float(counted.sum()))


@given(seed=st.integers(0, 10_000), high=st.floats(0.1, 1))
def test_no_other_threshold_has_a_higher_expected_dice(seed: int, high: float) -> None:
    maps = _maps(seed, 0, high)
    chosen = _expected_dice(maps, maps > best_threshold(maps))
    others = [_expected_dice(maps, maps >= p) for p in maps.flatten().tolist() if p > NEGLIGIBLE]
    assert chosen == pytest.approx(max(others))


def test_the_threshold_is_half_the_dice_that_can_be_expected() -> None:
    maps = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    threshold = best_threshold(maps)
    assert threshold == pytest.approx(_expected_dice(maps, maps > threshold) / 2, abs=0.001)


def test_over_many_truths_it_beats_one_half() -> None:
    maps = _maps(0, 0.1, 0.6)
    truths = [torch.rand(SHAPE, generator=torch.Generator().manual_seed(k)) < maps for k in range(200)]

    def mean(threshold: float) -> float:
        return sum(dice_of(maps > threshold, truth) for truth in truths) / len(truths)

    assert best_threshold(maps) < 0.4
    assert mean(best_threshold(maps)) > mean(0.5) + 0.1


@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.02, 1))
def test_sure_sources_keep_what_they_found(seed: int, sharpness: float) -> None:
    mask = _maps(seed) > 0.5
    mask[0, 0, 0] = True
    maps = torch.where(mask, 1 - 0.04 * sharpness, 0.04 * sharpness)
    assert torch.equal(centred(maps[None])[0] > 0.5, mask)


@given(seed=st.integers(0, 10_000), high=st.floats(0.1, 1))
def test_centring_keeps_the_order_of_voxels_and_puts_the_threshold_at_one_half(seed: int, high: float) -> None:
    maps = _maps(seed, 0.01, high)
    moved = centred(maps[None])[0]
    assert torch.equal(moved.flatten().argsort(), maps.flatten().argsort())
    assert torch.equal(moved > 0.5, maps > best_threshold(maps))


def test_classes_have_thresholds_of_their_own() -> None:
    faint, sure = _maps(0, 0, 0.3), (_maps(1) > 0.7).double()
    both = centred(torch.stack([faint, sure]))
    assert torch.equal(both[0], centred(faint[None])[0])
    assert torch.equal(both[1] > 0.5, sure > 0.5)


def test_many_voxels_that_are_surely_background_count_for_nothing() -> None:
    structure, background = torch.full((100,), 0.9), torch.full((100_000,), 0.02)
    assert best_threshold(torch.cat([structure, background])) == best_threshold(structure)


def test_where_nothing_is_likely_nothing_is_found() -> None:
    faint = torch.full((1, *SHAPE), 0.9 * NEGLIGIBLE)
    assert best_threshold(faint) == 0.5
    assert not bool((centred(faint) > 0.5).any())
    assert not bool((centred(torch.zeros(1, *SHAPE)) > 0.5).any())
