"""Where a slice of a scan lies in the square input of a 2D encoder, for images, prompts and answers alike.

A voxel r covers the interval r to r + 1; edges scale, so the centre of voxel r lies at (r + 0.5) * scale. SAM's prompt
encoders add half a pixel to whatever they are given: hand them these coordinates less 0.5.
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
_PERCENTILE_VOXELS = 4_000_000  # beyond this many, percentiles are taken on a regular sub-grid

Plane = tuple[int, int]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Framing:
    """How (H, W) slices fill a square frame.

    Attributes:
        side: pixels along each side of the encoder's input.
        stretched: whether both sides fill the frame; otherwise the longer one does, proportions are kept, and the rest
            below and to the right is padding.
    """

    side: int
    stretched: bool = False

    def size(self, plane: Plane) -> Plane:
        """Return the pixels (rows, columns) that an (H, W) slice fills, at the upper left of the frame."""
        if self.stretched:
            return self.side, self.side
        longest = max(plane)
        rows, columns = (max(1, math.floor(side * self.side / longest + 0.5)) for side in plane)
        return rows, columns

    def frames(self, slices: Tensor) -> Tensor:
        """Resize slices (N, H, W) to (N, rows, columns), bilinear and antialiased, without padding."""
        size = self.size((int(slices.shape[1]), int(slices.shape[2])))
        resized = F.interpolate(
            slices[:, None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
        )
        return resized[:, 0]

    def pad(self, frames: Tensor, value: float = 0.0) -> Tensor:
        """Fill frames (..., rows, columns) up to (..., side, side)."""
        return F.pad(frames, (0, self.side - frames.shape[-1], 0, self.side - frames.shape[-2]), value=value)

    def box(self, box: SliceBox, shape: Shape) -> tuple[float, float, float, float]:
        """Map a box from voxels to the frame; an inclusive box covers row_min to row_max + 1.

        Args:
            box: inclusive voxel bounds (row_min, column_min, row_max, column_max); beyond the slice they are cut.
            shape: (H, W, D) of the scan.

        Returns:
            (x_min, y_min, x_max, y_max) edges in frame pixels, x along columns, within 0..side.

        Raises:
            ValueError: the box is empty, not finite or outside the scan.
        """
        height, width, depth = shape
        if not 0 <= box.index < depth:
            raise ValueError(f"a box is on slice {box.index}; this scan has slices 0 to {depth - 1}")
        if not all(math.isfinite(bound) for bound in box.bounds):
            raise ValueError(f"the box {box.bounds} on slice {box.index} has bounds that are not finite")
        row_min, column_min, row_max, column_max = box.bounds
        if row_max < row_min or column_max < column_min:
            raise ValueError(
                f"the box {box.bounds} on slice {box.index} is empty; "
                "accepted is (row_min, column_min, row_max, column_max), inclusive, no maximum below its minimum"
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
            raise ValueError(f"a slice-wise model takes clicks on whole slices, not at {index}")
        rows, columns = self.size(shape[:2])
        return (column + 0.5) * columns / shape[1], (row + 0.5) * rows / shape[0]

    def mask(self, masks: Tensor, side: int, outside: float) -> Tensor:
        """Map slices of a mask (N, H, W) to the low-resolution frame (N, 1, side, side) that prompt encoders take.

        Args:
            masks: any float map, resized bilinearly.
            side: pixels of the low-resolution frame.
            outside: value of the padding.
        """
        low = Framing(side, self.stretched)
        return low.pad(low.frames(masks), outside)[:, None]

    def unframe(self, maps: Tensor, plane: Plane) -> Tensor:
        """Map answers over the whole frame (N, S, S), at any resolution S, back onto slices (N, H, W), bilinear."""
        if maps.shape[-1] != self.side:  # to the frame's own pixels first, where the padding ends on a whole one
            maps = F.interpolate(maps[:, None], size=(self.side, self.side), mode="bilinear", align_corners=False)[:, 0]
        rows, columns = self.size(plane)
        maps = maps[:, None, :rows, :columns]
        return F.interpolate(maps, size=plane, mode="bilinear", align_corners=False)[:, 0]

    def shares(self, masks: Tensor, side: int) -> Tensor:
        """Map slices of a mask (N, H, W) to the share of each feature's part of the frame that it covers.

        Args:
            masks: values in [0, 1].
            side: features along each side of the frame, a divisor of the frame's pixels.

        Returns:
            (N, side, side) in [0, 1]; the padding is not covered by anything.
        """
        return F.adaptive_avg_pool2d(self.pad(self.frames(masks))[:, None], side)[:, 0]

    def spread(self, maps: Tensor, plane: Plane) -> Tensor:
        """Map a value for each feature (N, S, S) onto slices (N, H, W); those of padding alone reach no voxel."""
        side = maps.shape[-1]
        rows, columns = (math.ceil(pixels * side / self.side) for pixels in self.size(plane))
        inside = maps[:, None, :rows, :columns]
        return self.unframe(F.pad(inside, (0, side - columns, 0, side - rows), mode="replicate")[:, 0], plane)


@runtime_checkable
class FeatureMaps(Protocol):
    """What a slice-wise generalist offers besides, if its card says `feature_maps`: where each feature lies."""

    @property
    def framing(self) -> Framing:
        """How slices fill the frame over which the features lie."""

    def feature_map(self, embedding: Tensor) -> Tensor:
        """Return the features (C, S, S) of one slice's embedding, over the whole frame, padding included."""


def check_point(point: Point, shape: Shape) -> None:
    """Check that a click lies inside the scan.

    Raises:
        ValueError: it does not, or is not finite.
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
        ValueError: it is not, or has not.
    """
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(f"a scan must have shape (H, W, D), none of them 0, not {tuple(volume.shape)}")
    if outside := [unit for unit in units if not 0 <= unit < volume.shape[2]]:
        raise ValueError(f"slices {outside} are outside the scan, which has slices 0 to {volume.shape[2] - 1}")


def encode_slices(
    volume: Tensor,
    units: Sequence[int],
    batch_size: int,
    encode: Callable[[Sequence[int], tuple[float, float]], Tensor],
) -> dict[int, Tensor]:
    """Encode slices of a scan, a batch at a time.

    Args:
        volume: (H, W, D), in any intensity unit.
        units: slice numbers in 0..D-1.
        batch_size: slices at a time.
        encode: (slice numbers, the scan's `intensity_limits`) -> their embeddings, one a row.

    Returns:
        slice -> embedding: an ordinary tensor outside of inference mode, which keeps no other alive.

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
    """Return the 0.5 and 99.5 percentile of a scan (H, W, D); of a very large one, on a regular sub-grid.

    Raises:
        ValueError: they are not finite.
    """
    stride = max(1, math.ceil((volume.numel() / _PERCENTILE_VOXELS) ** (1 / 3)))
    sample = volume[::stride, ::stride, ::stride].float().cpu().numpy()
    low, high = (float(limit) for limit in np.percentile(sample, _PERCENTILES))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the scan has intensities that are not finite; clean them before embedding")
    return low, high


def stretch(frames: Tensor) -> Tensor:
    """Scale each frame (N, ...) to 0..1 by its own minimum and maximum; a constant one becomes 0."""
    dims = tuple(range(1, frames.ndim))
    darkest = frames.amin(dim=dims, keepdim=True)
    span = frames.amax(dim=dims, keepdim=True) - darkest
    scaled: Tensor = (frames - darkest) / torch.where(span > 0, span, 1.0)
    return scaled


def chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the items in runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
