"""How slices map to the square input of a 2D encoder: one mapping for images, prompts and answers.

Voxel r covers the interval from r to r + 1. Edges are scaled, so the centre of voxel r maps to (r + 0.5) * scale. SAM's
prompt encoders add half a pixel to their inputs, so subtract 0.5 from these coordinates before passing them on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semisam_core.generalists.base import Point, SliceBox

_PERCENTILES = (0.5, 99.5)
_PERCENTILE_VOXELS = 4_000_000  # percentiles of larger scans are taken on a regular sub-grid

Plane = tuple[int, int]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Framing:
    """How (H, W) slices fill a square frame.

    Attributes:
        side: pixels along each side of the encoder's input.
        stretched: whether both sides fill the frame; otherwise the longer side does, proportions are kept, and the
            frame is padded below and to the right.
    """

    side: int
    stretched: bool = False

    def size(self, plane: Plane) -> Plane:
        """Return how many pixels (rows, columns) an (H, W) slice fills, from the upper left of the frame."""
        if self.stretched:
            return self.side, self.side
        longest = max(plane)
        rows, columns = (max(1, math.floor(side * self.side / longest + 0.5)) for side in plane)
        return rows, columns

    def frames(self, slices: Tensor) -> Tensor:
        """Resize slices (N, H, W) to (N, rows, columns), bilinear with antialiasing, without padding."""
        size = self.size((int(slices.shape[1]), int(slices.shape[2])))
        resized = F.interpolate(
            slices[:, None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
        )
        return resized[:, 0]

    def pad(self, frames: Tensor, value: float = 0.0) -> Tensor:
        """Pad frames (..., rows, columns) to (..., side, side)."""
        return F.pad(frames, (0, self.side - frames.shape[-1], 0, self.side - frames.shape[-2]), value=value)

    def box(self, box: SliceBox, shape: Shape) -> tuple[float, float, float, float]:
        """Map a box from voxels to the frame; an inclusive box covers row_min to row_max + 1.

        Args:
            box: inclusive voxel bounds (row_min, column_min, row_max, column_max); clipped to the slice.
            shape: (H, W, D) of the scan.

        Returns:
            Edges (x_min, y_min, x_max, y_max) in frame pixels, x along columns, within 0..side.

        Raises:
            ValueError: the box is empty, not finite or outside the scan.
        """
        height, width, depth = shape
        if not 0 <= box.index < depth:
            raise ValueError(f"a box is on slice {box.index}; this scan has slices 0 to {depth - 1}")
        if not all(math.isfinite(bound) for bound in box.bounds):
            raise ValueError(f"the box {box.bounds} on slice {box.index} is not finite")
        row_min, column_min, row_max, column_max = box.bounds
        if row_max < row_min or column_max < column_min:
            raise ValueError(
                f"the box {box.bounds} on slice {box.index} is empty; "
                "bounds are (row_min, column_min, row_max, column_max), inclusive, with no maximum below its minimum"
            )
        top, bottom = max(row_min, 0.0), min(row_max + 1, height)
        left, right = max(column_min, 0.0), min(column_max + 1, width)
        if top >= bottom or left >= right:
            raise ValueError(f"the box {box.bounds} on slice {box.index} lies outside the {height} x {width} slice")
        rows, columns = self.size((height, width))
        return left * columns / width, top * rows / height, right * columns / width, bottom * rows / height

    def point(self, point: Point, shape: Shape) -> tuple[float, float]:
        """Map a click from voxels to (x, y) in frame pixels, x along columns.

        Raises:
            ValueError: the click is not finite, outside the scan, or between two slices.
        """
        check_point(point, shape)
        row, column, index = point.position
        if index != round(index):
            raise ValueError(f"a click for a slice-wise model must be on a whole slice, not at {index}")
        rows, columns = self.size(shape[:2])
        return (column + 0.5) * columns / shape[1], (row + 0.5) * rows / shape[0]

    def mask(self, masks: Tensor, side: int, outside: float) -> Tensor:
        """Map slices of a mask (N, H, W) to the low-resolution frames (N, 1, side, side) that prompt encoders take.

        Args:
            masks: float maps, resized bilinearly.
            side: pixels along each side of the low-resolution frame.
            outside: value of the padding.
        """
        low = Framing(side, self.stretched)
        return low.pad(low.frames(masks), outside)[:, None]

    def unframe(self, maps: Tensor, plane: Plane) -> Tensor:
        """Map answers over the whole frame (N, S, S), at any resolution S, back to slices (N, H, W), bilinear."""
        if maps.shape[-1] != self.side:  # to the frame's own pixels first, where padding starts at a whole pixel
            maps = F.interpolate(maps[:, None], size=(self.side, self.side), mode="bilinear", align_corners=False)[:, 0]
        rows, columns = self.size(plane)
        maps = maps[:, None, :rows, :columns]
        return F.interpolate(maps, size=plane, mode="bilinear", align_corners=False)[:, 0]

    def shares(self, masks: Tensor, side: int) -> Tensor:
        """Map slices of a mask (N, H, W) to the share of each feature's patch that it covers.

        Args:
            masks: values in [0, 1].
            side: features along each side of the frame, a divisor of the frame's pixels.

        Returns:
            (N, side, side) in [0, 1]; 0 in the padding.
        """
        return F.adaptive_avg_pool2d(self.pad(self.frames(masks))[:, None], side)[:, 0]

    def spread(self, maps: Tensor, plane: Plane) -> Tensor:
        """Map one value per feature (N, S, S) to slices (N, H, W); values of patches in the padding are not used."""
        side = maps.shape[-1]
        rows, columns = (math.ceil(pixels * side / self.side) for pixels in self.size(plane))
        inside = maps[:, None, :rows, :columns]
        return self.unframe(F.pad(inside, (0, side - columns, 0, side - rows), mode="replicate")[:, 0], plane)


@runtime_checkable
class FeatureMaps(Protocol):
    """What a slice-wise generalist must also offer if its card says `feature_maps`."""

    @property
    def framing(self) -> Framing:
        """How slices fill the frame that the features cover."""

    def feature_map(self, embedding: Tensor) -> Tensor:
        """Return the features (C, S, S) of one slice's embedding, over the whole frame including its padding."""


def check_point(point: Point, shape: Shape) -> None:
    """Check that a click lies inside the scan.

    Raises:
        ValueError: it is outside or not finite.
    """
    inside = all(
        math.isfinite(position) and -0.5 <= position < side - 0.5
        for position, side in zip(point.position, shape, strict=True)
    )
    if not inside:
        raise ValueError(f"the click at {point.position} lies outside the scan of shape {shape}")


def check_slices(volume: Tensor, units: Sequence[int]) -> None:
    """Check that a scan is 3D and has these slices.

    Raises:
        ValueError: it is not 3D or lacks a slice.
    """
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(f"a scan must have shape (H, W, D) without zeros, not {tuple(volume.shape)}")
    if outside := [unit for unit in units if not 0 <= unit < volume.shape[2]]:
        raise ValueError(f"slices {outside} are outside the scan, which has slices 0 to {volume.shape[2] - 1}")


def encode_slices(
    volume: Tensor,
    units: Sequence[int],
    batch_size: int,
    encode: Callable[[Sequence[int], tuple[float, float]], Tensor],
) -> dict[int, Tensor]:
    """Encode slices of a scan in batches.

    Args:
        volume: (H, W, D), in any intensity unit.
        units: slice numbers in 0..D-1.
        batch_size: slices per batch.
        encode: (slice numbers, the scan's `intensity_limits`) -> their embeddings, one per row.

    Returns:
        slice -> embedding: an ordinary tensor (no inference tensor) that owns its memory.

    Raises:
        ValueError: the scan is not 3D, a slice lies outside it, or its intensities are not finite.
    """
    check_slices(volume, units)
    limits = intensity_limits(volume)
    return {
        unit: embedding.clone(memory_format=torch.contiguous_format)
        for chunk in chunks(units, batch_size)
        for unit, embedding in zip(chunk, encode(chunk, limits), strict=True)
    }


def intensity_limits(volume: Tensor) -> tuple[float, float]:
    """Return the 0.5 and 99.5 percentiles of a scan (H, W, D); of a very large one, on a regular sub-grid.

    Raises:
        ValueError: the percentiles are not finite.
    """
    stride = max(1, math.ceil((volume.numel() / _PERCENTILE_VOXELS) ** (1 / 3)))
    sample = volume[::stride, ::stride, ::stride].float().cpu().numpy()
    low, high = (float(limit) for limit in np.percentile(sample, _PERCENTILES))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the scan has intensities that are not finite; replace them before embedding")
    return low, high


def stretch(frames: Tensor) -> Tensor:
    """Scale each frame (N, ...) to 0..1 by its own minimum and maximum; a constant frame becomes 0."""
    dims = tuple(range(1, frames.ndim))
    darkest = frames.amin(dim=dims, keepdim=True)
    span = frames.amax(dim=dims, keepdim=True) - darkest
    scaled: Tensor = (frames - darkest) / torch.where(span > 0, span, 1.0)
    return scaled


def chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the items in chunks of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
