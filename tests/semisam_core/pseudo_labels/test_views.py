"""A turned scan keeps its voxels' sizes and comes back as it was; answers between slices are interpolated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.prompting import Region
from semisam_core.pseudo_labels.views import AXES, View, fill_between, smooth_over_slices
from tests.semisam_core.pseudo_labels.scenes import FIRST, SECOND, SHAPE, SPACING, cuboid

PLANES = ["axial", "coronal", "sagittal"]


@pytest.mark.parametrize(
    ("plane", "shape", "spacing_mm"),
    [
        ("axial", (24, 20, 14), (1.5, 2.0, 3.0)),
        ("coronal", (24, 14, 20), (1.5, 3.0, 2.0)),
        ("sagittal", (20, 14, 24), (2.0, 3.0, 1.5)),
    ],
)
def test_shape_and_voxel_size_turn_with_the_scan(
    plane: str, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    view = View(cuboid(FIRST), SPACING, AXES[plane])
    assert (view.grid.shape, view.grid.spacing_mm) == (shape, spacing_mm)
    assert tuple(view.volume.shape) == shape


@pytest.mark.parametrize("plane", PLANES)
def test_turning_back_undoes_turning(plane: str) -> None:
    volume = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    view = View(volume, SPACING, AXES[plane])
    assert torch.equal(view.complete(view.turn(volume).contiguous(), (), 1, 0.0), volume)
    assert view.turn(volume).untyped_storage().data_ptr() == volume.untyped_storage().data_ptr()


@pytest.mark.parametrize("plane", PLANES)
def test_a_region_turns_with_the_scan(plane: str) -> None:
    view = View(cuboid(FIRST), SPACING, AXES[plane])
    region = view.turn_region(Region(cuboid(FIRST).numpy() > 0, cuboid(SECOND).numpy() > 0, SPACING, connected=True))
    assert np.array_equal(region.mask, view.volume.numpy() > 0)
    assert np.array_equal(region.others, view.turn(cuboid(SECOND)).numpy() > 0)
    assert region.spacing_mm == view.grid.spacing_mm
    assert region.connected


def test_views_of_one_scan_have_different_keys() -> None:
    volume = torch.rand((8, 8, 8), generator=torch.Generator().manual_seed(0))
    keys = [View(volume, SPACING, axis).key for axis in AXES.values()]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


@pytest.mark.parametrize(("plane", "step"), [("axial", 2), ("coronal", 3), ("sagittal", 4)])
def test_the_step_between_slices_is_measured_across_the_slices(plane: str, step: int) -> None:
    view = View(cuboid(FIRST), SPACING, AXES[plane])  # slices 3, 2 and 1.5 mm apart
    assert view.slice_step(6.0) == step
    assert view.slice_step(0.0) == 1


@settings(deadline=None, max_examples=30)
@given(step=st.integers(1, 5), seed=st.integers(0, 1000))
def test_between_answered_slices_probabilities_are_interpolated(step: int, seed: int) -> None:
    slope = float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    truth = slope * torch.linspace(0, 1, 21).expand(2, 3, 21)  # linear along the slices: interpolation is exact
    answered = list(range(0, 21, step))
    sparse = torch.zeros(2, 3, 21)
    sparse[..., answered] = truth[..., answered]
    filled = fill_between(sparse, answered, step)
    assert torch.allclose(filled[..., : answered[-1] + 1], truth[..., : answered[-1] + 1], atol=1e-6)


def test_beyond_the_last_answered_slice_probabilities_fade() -> None:
    sparse = torch.zeros(1, 1, 12)
    sparse[..., 4] = 0.8
    assert fill_between(sparse, [4], 4)[0, 0].tolist() == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]
    )


def test_an_answered_slice_off_the_lattice_is_kept() -> None:
    sparse = torch.zeros(1, 1, 9)
    sparse[..., [0, 2, 4]] = torch.tensor([0.4, 0.9, 0.8])
    assert fill_between(sparse, [0, 2, 4], 4)[0, 0, :5].tolist() == pytest.approx([0.4, 0.5, 0.9, 0.7, 0.8])


def test_smoothing_acts_along_the_slices_only() -> None:
    probability = torch.zeros(5, 4, 9)
    probability[2, 1, 4] = 1.0
    smooth = smooth_over_slices(probability, 1.0)
    assert float(smooth.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float(smooth[2, 1].sum()) == pytest.approx(float(smooth.sum()))
    assert 0 < float(smooth[2, 1, 3]) < float(smooth[2, 1, 4]) < 1
    assert torch.equal(smooth_over_slices(probability, 0.0), probability)
