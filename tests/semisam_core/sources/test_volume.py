"""The size of a combination is held to that of the labels, and which voxels come first stays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semisam_core import scratch
from semisam_core.sources.volume import REACH, at_plausible_volume, largest

SHAPE = (8, 7, 6)


def _maps(seed: int, low: float, high: float, classes: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand((classes, *SHAPE), generator=generator, dtype=torch.float64)


def _shifted(maps: Tensor, expected: Sequence[float | None], tolerance: float) -> Tensor:
    return torch.stack([at_plausible_volume(p.clone(), v, tolerance) for p, v in zip(maps, expected, strict=True)])


def _count(maps: Tensor) -> list[int]:
    return [int((each > 0.5).sum()) for each in maps]


@given(
    seed=st.integers(0, 1000),
    high=st.floats(0.2, 0.9),
    expected=st.floats(1, 300),
    tolerance=st.floats(1, 4),
)
def test_a_volume_moves_to_the_nearest_plausible_one_and_the_order_of_voxels_stays(
    seed: int, high: float, expected: float, tolerance: float
) -> None:
    maps = _maps(seed, REACH, high)
    shifted = _shifted(maps, [expected], tolerance)
    nearest = min(max(_count(maps)[0], expected / tolerance), expected * tolerance)
    assert abs(_count(shifted)[0] - nearest) <= 0.5
    assert torch.equal(shifted.flatten().argsort(), maps.flatten().argsort())
    assert 0 <= float(shifted.min()) <= float(shifted.max()) <= 1


@given(seed=st.integers(0, 1000), tolerance=st.floats(1, 4))
def test_a_plausible_volume_and_one_without_expectation_stay(seed: int, tolerance: float) -> None:
    maps = _maps(seed, 0, 1, 2)
    assert torch.equal(_shifted(maps, [float(_count(maps)[0]), None], tolerance), maps)


def test_each_class_has_its_own_volume() -> None:
    assert _count(_shifted(_maps(0, REACH, 0.45, 2), [20.0, 80.0], 1.0)) == [20, 80]


def test_too_much_is_reduced_to_what_is_surest() -> None:
    maps = _maps(0, 0.55, 0.85)
    shifted = _shifted(maps, [30.0], 1.0)
    assert torch.equal(shifted > 0.5, maps >= maps.flatten().topk(30).values[-1])


def test_what_no_source_believes_in_is_not_made_foreground() -> None:
    maps = _maps(0, 0, 0.9 * REACH)
    maps[0, 0, 0, :3] = 0.4
    shifted = _shifted(maps, [50.0], 1.0)
    assert _count(shifted) == [3]
    assert _count(_shifted(1 - maps, [50.0], 1.0)) == [maps.numel() - 3]


@pytest.mark.parametrize("expected", [0.0, 0.3, 10_000.0])
def test_a_volume_smaller_than_a_voxel_or_larger_than_the_scan_is_no_mistake(expected: float) -> None:
    maps = _maps(0, 0.2, 0.6)
    shifted = _shifted(maps, [expected], 1.0)
    assert bool(torch.isfinite(shifted).all())
    assert _count(shifted) == (_count(maps) if expected < 1 else [maps.numel() - 1])


@given(seed=st.integers(0, 1000), kind=st.sampled_from([torch.float32, torch.float64]), rank=st.integers(1, 336))
def test_the_largest_values_are_those_of_a_sort(seed: int, kind: torch.dtype, rank: int) -> None:
    values = _maps(seed, 0, 1)[0].to(kind)
    values[:4] = values[:4].round(decimals=1)  # equal ones
    values[0, 0] = -0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "BLOCK", 64)
        assert largest(values, [rank, 1]) == values.flatten().sort(descending=True).values[[rank - 1, 0]].tolist()
