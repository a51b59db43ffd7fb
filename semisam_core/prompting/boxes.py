"""Boxes around a region, slice by slice."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from semisam_core.components import Mask, separate_components
from semisam_core.generalists.base import SliceBox
from semisam_core.prompting.region import MAXIMUM_PARTS, Region

Bounds = tuple[float, float, float, float]  # row_min, column_min, row_max, column_max in voxels, inclusive


def slice_boxes(
    region: Region, margin_mm: float, smooth_slices: int, component_share: float = 0.0
) -> tuple[SliceBox, ...]:
    """Return the boxes on each slice along the last axis that the region touches.

    Each component of a slice gets a box of its own, since a box around two objects asks for everything between them
    too. A connected region gets one box on each slice.

    The bounds are smoothed by a median along the slices, so that a single bad slice moves no box. The margin is added
    afterwards.

    Args:
        region: what to surround.
        margin_mm: how far to move the bounds outwards; inwards if negative, but never so far that less than half of a
            side is left.
        smooth_slices: length of the median, odd.
        component_share: a component gets no box if it is smaller than this share of the slice's largest one.

    Returns:
        In order of slices, at most `MAXIMUM_PARTS` on each.
    """
    tracks = [_whole(region.mask)] if region.connected else follow_components(region.mask, component_share)
    boxes = [box for track in tracks for box in _track_boxes(track, region, margin_mm, smooth_slices)]
    return tuple(sorted(boxes, key=lambda box: (box.index, box.bounds)))


@dataclass
class Track:
    """One component, followed from slice to slice.

    Attributes:
        slices: slice numbers, ascending.
        bounds: the component's bounds on each of them.
    """

    slices: list[int] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)

    def append(self, index: int, part: Mask) -> None:
        """Add the component's part (H, W) on a slice."""
        self.slices.append(index)
        self.bounds.append(part_bounds(part))


def follow_components(mask: Mask, share: float) -> list[Track]:
    """Follow each component of a slice to the component of the next slice that it overlaps most.

    Where components merge, the track with the largest overlap continues and the others end. Where one divides, its
    largest part continues the track.

    Args:
        mask: (H, W, D).
        share: components below this share of their slice's largest one are left out.
    """
    tracks: list[Track] = []
    reached: list[tuple[Track, Mask]] = []  # tracks that the slice before belongs to, and their part of it
    for index in range(mask.shape[2]):
        free, reached = reached, []
        for part in separate_components(mask[:, :, index], share, MAXIMUM_PARTS):
            overlaps = [int((part & last).sum()) for _, last in free]
            if overlaps and max(overlaps) > 0:
                track, _ = free.pop(int(np.argmax(overlaps)))
            else:
                tracks.append(track := Track())
            track.append(index, part)
            reached.append((track, part))
    return tracks


def part_bounds(part: Mask) -> Bounds:
    """Return the inclusive bounds of a mask (H, W) with at least one pixel."""
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    return float(rows[0]), float(columns[0]), float(rows[-1]), float(columns[-1])


def smooth_bounds(slices: NDArray[np.int64], bounds: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Median-filter each bound (N, 4) along runs of neighbouring slices (N,)."""
    smoothed = bounds.copy()
    runs = np.split(np.arange(len(slices)), np.flatnonzero(np.diff(slices) > 1) + 1)
    for run in runs:
        smoothed[run] = ndimage.median_filter(bounds[run], size=(window, 1), mode="nearest")
    return smoothed


def _whole(mask: Mask) -> Track:
    """Return everything that each slice shows as one track."""
    track = Track()
    for index in np.flatnonzero(mask.any(axis=(0, 1))):
        track.append(int(index), mask[:, :, index])
    return track


def _track_boxes(track: Track, region: Region, margin_mm: float, smooth_slices: int) -> list[SliceBox]:
    bounds = smooth_bounds(np.array(track.slices), np.array(track.bounds), smooth_slices)
    rows, columns = margin_mm / region.spacing_mm[0], margin_mm / region.spacing_mm[1]
    last_row, last_column = region.mask.shape[0] - 1.0, region.mask.shape[1] - 1.0
    boxes = []
    for index, (top, left, bottom, right) in zip(track.slices, bounds.tolist(), strict=True):
        dr, dc = max(rows, -(bottom - top) / 4), max(columns, -(right - left) / 4)
        box = (max(0.0, top - dr), max(0.0, left - dc), min(last_row, bottom + dr), min(last_column, right + dc))
        boxes.append(SliceBox(index, box))
    return boxes
