"""Measurements agree with their obvious definitions, and a scan's identity survives how it is saved."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from nibabel.orientations import apply_orientation, inv_ornt_aff

from intake.check import measure
from semisam_core.data.geometry import Geometry
from tests.intake.check.sites import patient

SPECIAL = st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, -0.0])
VOLUMES = arrays(np.float32, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7), elements=SPECIAL)
AXES = st.tuples(st.sampled_from(list(permutations(range(3)))), st.sampled_from(list(product((1, -1), repeat=3))))


def _geometry(shape: tuple[int, ...], affine: np.ndarray | None = None) -> Geometry:
    return Geometry(
        (shape[0], shape[1], shape[2]), torch.from_numpy(np.diag([1.0, 2, 3, 1]) if affine is None else affine)
    )


@given(volume=VOLUMES, slab=st.integers(1, 60))
def test_intensities_in_slabs_are_those_of_the_whole(volume: np.ndarray, slab: int) -> None:
    structures = (np.arange(volume.size).reshape(volume.shape) % 3).astype(np.uint8)
    finite = volume[np.isfinite(volume)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SLAB_VOXELS", slab)
        found = measure.measure_intensities(volume, structures)
    if not finite.size:
        assert found is None
        return
    assert found is not None
    assert (found.nan, found.infinite) == (np.isnan(volume).sum(), np.isinf(volume).sum())
    assert found.nan_in_label == (np.isnan(volume) & (structures > 0)).sum()
    assert (found.minimum, found.maximum) == (finite.min(), finite.max())
    assert found.percentiles == pytest.approx(np.percentile(finite, measure.PERCENTILES))


@given(volume=VOLUMES, slab=st.integers(1, 60))
def test_the_values_of_a_label_in_slabs_are_those_of_the_whole(volume: np.ndarray, slab: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SLAB_VOXELS", slab)
        values, more = measure.label_values(volume)
    assert np.array_equal(values, np.unique(volume), equal_nan=True)
    assert not more


@given(axes=AXES, change=st.booleans(), at=st.integers(0, 59))
def test_a_scan_is_recognized_along_any_axes_and_only_if_every_voxel_agrees(
    axes: tuple[tuple[int, ...], tuple[int, ...]], change: bool, at: int
) -> None:
    volume = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    geometry = _geometry(volume.shape)
    orientation = np.stack(axes, axis=1).astype(float)
    turned = apply_orientation(volume, orientation).copy()
    affine = geometry.affine.numpy() @ inv_ornt_aff(orientation, volume.shape)
    if change:
        turned.flat[at] += 0.5
    same = measure.content_hashes(volume, geometry) & measure.content_hashes(turned, _geometry(turned.shape, affine))
    assert bool(same) is not change
    assert measure.content_hashes(turned, geometry) & measure.content_hashes(turned, _geometry(turned.shape, affine)), (
        "the same voxels with another header"
    )


def test_zeros_and_nan_have_one_hash_whatever_their_bits() -> None:
    volume = np.zeros((3, 4, 5), np.float32)
    other = -volume
    volume[0, 0, 0] = np.float32(np.nan)
    other.view(np.uint32)[0, 0, 0] = 0xFFC00123
    geometry = _geometry(volume.shape)
    assert measure.content_hashes(volume, geometry) == measure.content_hashes(other, geometry)


@given(scale=st.floats(0.01, 100), offset=st.floats(-1000, 1000), axes=AXES)
def test_a_miniature_ignores_scale_offset_and_the_order_of_axes(
    scale: float, offset: float, axes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    image, _ = patient(0)
    image = image[:16, :16, :16]
    geometry = _geometry(image.shape)
    orientation = np.stack(axes, axis=1).astype(float)
    turned = apply_orientation(image * np.float32(scale) + np.float32(offset), orientation)
    affine = geometry.affine.numpy() @ inv_ornt_aff(orientation, image.shape)
    first, second = measure.miniature(image, geometry), measure.miniature(turned, _geometry(turned.shape, affine))
    assert float(first @ second) == pytest.approx(1.0, abs=1e-3)
    other = measure.miniature(patient(1)[0][:16, :16, :16], geometry)
    assert float(first @ other) < 0.98


def test_a_constant_scan_resembles_nothing() -> None:
    volume = np.full((5, 9, 20), 3.3, np.float32)
    assert not measure.miniature(volume, _geometry(volume.shape)).any()


def test_structures_are_measured_in_millilitres_and_their_sides_named_for_the_patient() -> None:
    label = np.zeros((6, 5, 4), np.uint8)
    label[0:2, 1:3, 1] = 1
    label[4, 2, 2] = 1
    label[2:4, 3:5, 3] = 2
    affine = np.diag([-2.0, 5.0, 10.0, 1.0])  # left, anterior, superior
    one, two = measure.measure_classes(label, _geometry(label.shape, affine), {1: "one"}, None)
    assert (one.name, one.volume_ml, one.components_ml, one.touches) == ("one", 0.5, (0.4, 0.1), ("right",))
    assert (two.name, two.volume_ml, two.touches) == ("value 2", 0.4, ("front", "top"))


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_body_holds_its_cavities_and_not_the_air_around_it(modality: str) -> None:
    air, tissue = (-1000.0, 40.0) if modality == "CT" else (2.0, 100.0)
    volume = np.full((40, 40, 20), air, np.float32)
    volume[8:32, 8:32] = tissue
    volume[14:24, 14:24] = air  # lungs, open at both ends of the volume
    body = measure.find_body(volume, modality)
    assert body is not None
    assert body[8:32, 8:32].all()
    assert not body[:5].any()
    assert measure.find_body(volume, "PET") is None
    assert measure.find_body(volume * 0, "MR") is None


def test_a_large_scan_is_sampled_where_the_body_is_looked_for() -> None:
    volume = np.full((200, 20, 20), -1000.0, np.float32)
    volume[60:140, 5:15, 5:15] = 50.0
    label = np.zeros(volume.shape, np.uint8)
    label[0:20, 5:15, 5:15] = 1
    label[80:100, 5:15, 5:15] = 2
    body = measure.find_body(volume, "CT")
    assert body is not None
    assert max(body.shape) <= measure.BODY_SIDE
    outside, inside = measure.measure_classes(label, _geometry(volume.shape), {}, body)
    assert (outside.outside_body, inside.outside_body) == (1.0, 0.0)
