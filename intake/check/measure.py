"""Measure voxels: intensities, content, structures. Large arrays are read in slabs, so little is held twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from intake.check.facts import ClassFacts, Intensities
from semisam_core.components import component_sizes
from semisam_core.data.geometry import Geometry, axis_change

PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
SAMPLE = 2_000_000
"""Voxels of a large scan that percentiles are taken from."""
SLAB_VOXELS = 4_000_000
MOST_VALUES = 256
MINIATURE = 8
BODY_SIDE = 96
CT_AIR_HU = -500.0
OPPOSITE = {"R": "left", "L": "right", "A": "back", "P": "front", "S": "bottom", "I": "top"}
TOWARDS = {"R": "right", "L": "left", "A": "front", "P": "back", "S": "top", "I": "bottom"}

Volume = NDArray[np.float32]


def measure_intensities(voxels: Volume, structures: NDArray[np.uint8] | None) -> Intensities | None:
    """Return what the values of one channel are like; None if no value is finite.

    Args:
        voxels: (X, Y, Z).
        structures: (X, Y, Z) class indices on the same grid, 0 for background; None without a label.
    """
    nan = infinite = hidden = 0
    lowest, highest = math.inf, -math.inf
    for where, slab in _slabs(voxels):
        missing, finite = np.isnan(slab), np.isfinite(slab)
        nan += int(missing.sum())
        infinite += int(slab.size - finite.sum() - missing.sum())
        if structures is not None and missing.any():
            hidden += int((missing & (structures[..., where] > 0)).sum())
        if finite.any():
            lowest = min(lowest, float(slab.min(where=finite, initial=np.inf)))
            highest = max(highest, float(slab.max(where=finite, initial=-np.inf)))
    sample = _sample(voxels)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return None
    x = [float(each) for each in np.percentile(sample, PERCENTILES)]
    return Intensities(nan, infinite, hidden, lowest, highest, (x[0], x[1], x[2], x[3], x[4]))


def label_values(voxels: Volume) -> tuple[NDArray[np.float32], bool]:
    """Return the distinct values of a label in ascending order, and whether there were more than `MOST_VALUES`.

    NaN counts as one value and comes last.
    """
    values = np.empty(0, np.float32)
    for _, slab in _slabs(voxels):
        values = np.unique(np.concatenate([values, np.unique(slab)]))
        if len(values) > MOST_VALUES:
            return values[:MOST_VALUES], True
    return values, False


def content_hashes(voxels: Volume, geometry: Geometry) -> frozenset[str]:
    """Return hashes that stay the same if a scan is saved under another header, compression or voxel type.

    One is of the voxels in the file's order, one in the order of the patient's axes: two files are the same scan if
    they share either.
    """
    turned = _along_patient(voxels, geometry)
    same = turned.shape == voxels.shape and turned.strides == voxels.strides
    return frozenset({_hash(voxels)} if same else {_hash(voxels), _hash(turned)})


def miniature(voxels: Volume, geometry: Geometry) -> NDArray[np.float32]:
    """Return a scan's means in 8 x 8 x 8 blocks, scaled to mean 0 and length 1, (512,); zeros if all are equal."""
    turned = _along_patient(voxels, geometry)
    small = np.zeros((MINIATURE,) * 3)
    x, y, z = ([_block(side, k) for k in range(MINIATURE)] for side in turned.shape)
    for k, last in enumerate(z):
        plane = np.nan_to_num(turned[..., last], posinf=0.0, neginf=0.0).mean(axis=2, dtype=np.float64)
        for i, first in enumerate(x):
            row = plane[first].mean(axis=0)
            small[i, :, k] = [row[second].mean() for second in y]
    centred = small.ravel() - small.mean()
    length = float(np.linalg.norm(centred))
    if length <= 1e-9 * max(1.0, float(np.abs(small).max())):
        return np.zeros(MINIATURE**3, np.float32)
    scaled: NDArray[np.float32] = (centred / length).astype(np.float32)
    return scaled


def measure_classes(
    structures: NDArray[np.uint8], geometry: Geometry, names: dict[int, str], body: NDArray[np.bool_] | None
) -> tuple[ClassFacts, ...]:
    """Return what a label marks, one entry for each class in it.

    Args:
        structures: (X, Y, Z) class indices, 0 for background.
        geometry: of the label.
        names: names of the classes.
        body: (X, Y, Z) where the patient is, sampled at every `body_step`-th voxel; None if unknown.
    """
    voxel_ml = math.prod(geometry.spacing_mm) / 1000.0
    step = body_step(structures.shape)
    sampled = structures[::step, ::step, ::step]
    found = []
    for index, box in enumerate(ndimage.find_objects(structures), start=1):
        if box is None:
            continue
        sizes = component_sizes(structures[box] == index)
        outside = None
        if body is not None and (here := sampled == index).any():
            outside = float((here & ~body).sum() / here.sum())
        found.append(
            ClassFacts(
                index,
                names.get(index, f"value {index}"),
                float(sizes.sum()) * voxel_ml,
                tuple(float(size) * voxel_ml for size in sizes),
                _touched(box, geometry),
                outside,
            )
        )
    return tuple(found)


def body_step(shape: tuple[int, ...]) -> int:
    """Return the step at which the body is looked for, so that its mask has at most `BODY_SIDE` voxels a side."""
    return max(1, math.ceil(max(shape) / BODY_SIDE))


def find_body(voxels: Volume, modality: str | None) -> NDArray[np.bool_] | None:
    """Return where the patient is, at every `body_step`-th voxel; None for PET and other scans without a visible body.

    Everything brighter than air, its largest component, holes filled, and a margin of two voxels. Air is below -500 HU
    in CT, and below half of Otsu's threshold in MR.
    """
    if modality not in ("CT", "MR"):
        return None
    step = body_step(voxels.shape)
    small = np.nan_to_num(voxels[::step, ::step, ::step], posinf=0.0, neginf=0.0)
    if modality == "CT":
        threshold = CT_AIR_HU
    elif small.max() > small.min():
        low = float(small.min())
        threshold = low + 0.5 * (float(threshold_otsu(small)) - low)  # type: ignore[no-untyped-call]
    else:
        return None
    labels, count = ndimage.label(small > threshold)
    if not count:
        return None
    largest = labels == 1 + int(np.bincount(labels.ravel())[1:].argmax())
    body = np.pad(largest, 2)
    body = ndimage.binary_dilation(body, iterations=2)
    for axis in range(3):  # a tube that is open at the ends of the volume, as lungs may be, is closed within slices
        filled = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(body, axis, 0)]
        body = np.moveaxis(np.stack(filled), 0, axis)
    inner: NDArray[np.bool_] = body[2:-2, 2:-2, 2:-2]
    return inner


def _block(side: int, k: int) -> slice:
    """Return the k-th of `MINIATURE` parts of an axis, at least one voxel wide."""
    first, end = (side * edge // MINIATURE for edge in (k, k + 1))
    return slice(first, max(end, first + 1))


def _touched(box: tuple[slice, ...], geometry: Geometry) -> tuple[str, ...]:
    sides = []
    for part, length, towards in zip(box, geometry.shape, geometry.axes, strict=True):
        if part.start == 0:
            sides.append(OPPOSITE[towards])
        if part.stop == length:
            sides.append(TOWARDS[towards])
    return tuple(sides)


def _along_patient(voxels: Volume, geometry: Geometry) -> Volume:
    """Return a view whose axes run closest to R, A, S."""
    target = Geometry(geometry.shape, torch.eye(4, dtype=torch.float64))
    turned: Volume = apply_orientation(voxels, axis_change(geometry, target).orientation)
    return turned


def _hash(voxels: Volume) -> str:
    digest = hashlib.sha256(str(voxels.shape).encode())
    for _, slab in _slabs(voxels):
        same = slab + np.float32(0.0)  # no -0.0
        same[np.isnan(same)] = np.nan  # one NaN
        digest.update(np.ascontiguousarray(same.T, "<f4").data)
    return digest.hexdigest()


def _slabs(voxels: Volume) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield slabs along the last axis, along which NIfTI files are laid out, and where each is."""
    thickness = max(1, SLAB_VOXELS // max(1, voxels[..., 0].size))
    for first in range(0, voxels.shape[-1], thickness):
        where = slice(first, first + thickness)
        yield where, voxels[..., where]


def _sample(voxels: Volume) -> Volume:
    step = max(1, math.ceil((voxels.size / SAMPLE) ** (1 / 3)))
    return voxels[::step, ::step, ::step].ravel()
