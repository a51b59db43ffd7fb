"""Boxes on slices around a region."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from semisam_core.generalists.base import SliceBox
from semisam_core.prompting.region import Region


def slice_boxes(region: Region, margin_mm: float, smooth_slices: int) -> tuple[SliceBox, ...]:
    """Return a box on each slice along the last axis that the region touches.

    Its bounds are smoothed along the slices by a median, so that one bad slice moves no box, then moved outwards by the
    margin, or inwards where it is negative.
    """
    slices, bounds = slice_bounds(region.mask)
    bounds = smooth_bounds(slices, bounds, smooth_slices)
    rows, columns = margin_mm / region.spacing_mm[0], margin_mm / region.spacing_mm[1]
    last_row, last_column = region.mask.shape[0] - 1.0, region.mask.shape[1] - 1.0
    boxes = []
    for index, (top, left, bottom, right) in zip(slices, bounds.tolist(), strict=True):
        # A negative margin never shrinks a box beyond half of its size.
        dr, dc = max(rows, -(bottom - top) / 4), max(columns, -(right - left) / 4)
        box = (max(0.0, top - dr), max(0.0, left - dc), min(last_row, bottom + dr), min(last_column, right + dc))
        boxes.append(SliceBox(int(index), box))
    return tuple(boxes)


def slice_bounds(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the slices along the last axis that a mask touches (N,), and its inclusive bounds there.

    The bounds are (N, 4): row_min, column_min, row_max, column_max in voxels.
    """
    slices = np.flatnonzero(mask.any(axis=(0, 1)))
    bounds = np.empty((len(slices), 4))
    for position, index in enumerate(slices):
        rows = np.flatnonzero(mask[:, :, index].any(axis=1))
        columns = np.flatnonzero(mask[:, :, index].any(axis=0))
        bounds[position] = rows[0], columns[0], rows[-1], columns[-1]
    return slices, bounds


def smooth_bounds(slices: NDArray[np.int64], bounds: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Median-filter each bound along runs of neighbouring slices."""
    smoothed = bounds.copy()
    runs = np.split(np.arange(len(slices)), np.flatnonzero(np.diff(slices) > 1) + 1)
    for run in runs:
        smoothed[run] = ndimage.median_filter(bounds[run], size=(window, 1), mode="nearest")
    return smoothed
