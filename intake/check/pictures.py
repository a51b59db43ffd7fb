"""A small picture of a case: three planes through its label, or through its middle, outlines drawn on the scan."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import image as png
from matplotlib.colors import to_rgb
from nibabel.orientations import apply_orientation
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize

from intake.check.facts import Intensities
from semisam_core.data.geometry import Geometry, axis_change
from semisam_core.plan import Plan
from semisam_core.reporting.overview import COLOURS

SIDE = 96  # pixels
PLANES = ("axial", "coronal", "sagittal")
Window = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """One plane as it is looked at: the patient's front or head up, the patient's right side on the left.

    Attributes:
        grey: (rows, columns) values of the scan.
        structures: (rows, columns) class indices, or None without a label.
        size_mm: height and width.
    """

    grey: NDArray[np.float32]
    structures: NDArray[np.uint8] | None
    size_mm: tuple[float, float]


def planes_through(
    voxels: NDArray[np.float32],
    structures: NDArray[np.uint8] | None,
    geometry: Geometry,
    through: NDArray[np.uint8] | None = None,
) -> tuple[Plane, ...]:
    """Return the axial, coronal and sagittal plane through a label's centre, or the volume's where nothing is marked.

    Args:
        voxels: (X, Y, Z).
        structures: (X, Y, Z) class indices on the same grid, or None.
        geometry: of `voxels`.
        through: another label on the same grid whose centre is taken instead.
    """
    along_ras = axis_change(geometry, Geometry(geometry.shape, torch.eye(4, dtype=torch.float64)))
    scan = apply_orientation(voxels, along_ras.orientation)
    label = apply_orientation(structures, along_ras.orientation) if structures is not None else None
    middle = label if through is None else apply_orientation(through, along_ras.orientation)
    centre = _centre(middle) if middle is not None and middle.any() else tuple(side // 2 for side in scan.shape)
    extent = along_ras.geometry(geometry).extent_mm
    planes = []
    for axis in (2, 1, 0):
        across, up = (each for each in range(3) if each != axis)
        planes.append(
            Plane(
                _as_seen(scan, axis, centre[axis]),
                _as_seen(label, axis, centre[axis]) if label is not None else None,
                (extent[up], extent[across]),
            )
        )
    return tuple(planes)


def grey_window(plan: Plan | None, intensities: Intensities) -> Window:
    """Return the values shown as black and white: the plan's window if it has one, else percentiles of the scan."""
    if plan is not None and plan.data.intensity.kind == "window":
        return plan.data.intensity.lower, plan.data.intensity.upper
    return intensities.percentiles[0], intensities.percentiles[4]


def draw_planes(planes: Sequence[Plane], window: Window, side: int = SIDE) -> bytes:
    """Return a PNG of planes next to each other on one scale, each `side` pixels wide and high."""
    canvas = np.zeros((side, side * len(planes), 3))
    longest = max(max(plane.size_mm) for plane in planes)
    for number, plane in enumerate(planes):
        height, width = (max(1, round(side * extent / longest)) for extent in plane.size_mm)
        top, left = (side - height) // 2, number * side + (side - width) // 2
        canvas[top : top + height, left : left + width] = _painted(plane, (height, width), window)
    buffer = io.BytesIO()
    pixels = (255 * canvas).round().astype(np.uint8)
    png.imsave(buffer, pixels, format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return buffer.getvalue()


def _as_seen(volume: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    plane = volume[(slice(None),) * axis + (index,)]  # (across, up), both towards R, A or S
    return plane.T[::-1, ::-1]


def _centre(label: NDArray[np.uint8]) -> tuple[int, ...]:
    """Return for each axis the slice of the label's middle voxel: half of its voxels lie on either side."""
    places = []
    for axis in range(3):
        others = tuple(each for each in range(3) if each != axis)
        count = np.cumsum(np.count_nonzero(label, axis=others))
        places.append(int(np.searchsorted(count, count[-1] / 2)))
    return tuple(places)


def _painted(plane: Plane, size: tuple[int, int], window: Window) -> NDArray[np.float64]:
    low, high = window
    grey = np.clip((np.nan_to_num(plane.grey, nan=low) - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    small = resize(grey.astype(np.float64), size, order=1, anti_aliasing=True)  # type: ignore[no-untyped-call]
    colours = np.repeat(small[..., None], 3, axis=2)
    if plane.structures is None:
        return np.asarray(colours, np.float64)
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * side / n, side - 1).astype(int)
        for n, side in zip(size, plane.structures.shape, strict=True)
    )
    shown = plane.structures[np.ix_(rows, columns)]
    for index in np.unique(shown[shown > 0]):
        mask = shown == index
        colours[mask & ~ndimage.binary_erosion(mask)] = to_rgb(COLOURS[(int(index) - 1) % len(COLOURS)])
    return np.asarray(colours, np.float64)
