"""How a scan maps to the cubes that a 3D encoder takes: one mapping for images, prompts and answers.

A scan is resampled to isotropic voxels and cut into cubes on a fixed lattice, so that prompts that move a little still
use a cube that is already encoded. Voxel r covers the interval from r to r + 1. Edges are scaled, so the centre of
voxel r maps to (r + 0.5) * scale. Places are in these coordinates; subtract 0.5 for whole voxels of a cube.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from semisam_core.generalists.base import Point, Prompts, VolumeGrid
from semisam_core.generalists.slices import check_point

Shape = tuple[int, int, int]
Place = tuple[float, float, float]
Box = tuple[slice, slice, slice]

_OVERLAP = 4  # neighbouring cubes start a quarter of a side apart


@dataclass(frozen=True)
class CropLattice:
    """The cubes of one scan, numbered with the last axis fastest; the numbers depend on the grid alone.

    Along an axis no longer than a cube there is one cube, centred and padded. Along a longer axis, cubes start every
    quarter of a side, and the last ends with the scan.

    Attributes:
        grid: the scan's voxels.
        side: voxels along each edge of a cube.
        spacing_mm: size of these voxels. The resampled scan has the same borders and a whole number of voxels, so over
            its whole length it may differ from this size by half a voxel.

    Raises:
        ValueError: the grid has no voxels, or its voxels have no size.
    """

    grid: VolumeGrid
    side: int
    spacing_mm: float = 1.5

    def __post_init__(self) -> None:
        if min(self.grid.shape) < 1 or not all(math.isfinite(mm) and mm > 0 for mm in self.grid.spacing_mm):
            raise ValueError(
                f"a scan of shape {self.grid.shape} and voxel size {self.grid.spacing_mm} mm cannot be resampled; "
                "it needs at least one voxel along each axis, and sizes above 0"
            )

    @cached_property
    def size(self) -> Shape:
        """Shape of the resampled scan."""
        h, w, d = (
            max(1, math.floor(length * mm / self.spacing_mm + 0.5))
            for length, mm in zip(self.grid.shape, self.grid.spacing_mm, strict=True)
        )
        return h, w, d

    @cached_property
    def scale(self) -> Place:
        """Resampled voxels per voxel of the scan, along each axis."""
        h, w, d = (new / old for new, old in zip(self.size, self.grid.shape, strict=True))
        return h, w, d

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """First resampled voxel of the cubes along each axis; negative if a cube begins with padding."""
        h, w, d = (axis_starts(length, self.side) for length in self.size)
        return h, w, d

    def __len__(self) -> int:
        return math.prod(len(starts) for starts in self.starts)

    def origin(self, unit: int) -> Shape:
        """Return the first resampled voxel of a cube.

        Raises:
            ValueError: the scan has no such cube.
        """
        if not 0 <= unit < len(self):
            raise ValueError(f"there is no crop {unit}; this scan has crops 0 to {len(self) - 1}")
        h, w, d = self.starts
        rest, last = divmod(unit, len(d))
        first, middle = divmod(rest, len(w))
        return h[first], w[middle], d[last]

    def place(self, point: Point) -> Place:
        """Map a click from voxels of the scan to its place in the resampled scan.

        Raises:
            ValueError: the click is not finite or outside the scan.
        """
        check_point(point, self.grid.shape)
        h, w, d = (
            min((at + 0.5) * scale, length)
            for at, scale, length in zip(point.position, self.scale, self.size, strict=True)
        )
        return h, w, d

    def resample(self, volume: Tensor) -> Tensor:
        """Resample a scan (H, W, D), trilinear without prior smoothing, as in SAM-Med3D's training."""
        return _resize(volume.float(), self.size)

    def cut(self, resampled: Tensor, unit: int) -> Tensor:
        """Cut one cube (side, side, side) out of a resampled scan, padded with 0."""
        inside, within = self._overlap(unit)
        cube = resampled.new_zeros((self.side, self.side, self.side))
        cube[within] = resampled[inside]
        return cube

    def restore(self, cubes: Mapping[int, Tensor]) -> Tensor:
        """Map answers in cubes back to the scan (H, W, D): their mean where they overlap, 0 outside them."""
        total, count = torch.zeros(self.size), torch.zeros(self.size)
        for unit, cube in cubes.items():
            inside, within = self._overlap(unit)
            total[inside] += cube[within]
            count[inside] += 1
        return _resize(total / count.clamp_min(1), self.grid.shape)

    def window(self, unit: int) -> Box:
        """Return the part of the scan whose voxel centres are in a cube."""
        first, middle, last = (
            slice(
                max(0, math.ceil(start / scale - 0.5)),
                max(0, min(length, math.ceil((start + self.side) / scale - 0.5))),
            )
            for start, scale, length in zip(self.origin(unit), self.scale, self.grid.shape, strict=True)
        )
        return first, middle, last

    def cover(self, low: Place, high: Place) -> tuple[int, ...]:
        """Return the cubes that cover a box, in ascending order: one if possible, else a few, spread evenly."""
        along = [axis_cover(a, b, starts, self.side) for a, b, starts in zip(low, high, self.starts, strict=True)]
        _, width, depth = (len(starts) for starts in self.starts)
        return tuple((i * width + j) * depth + k for i, j, k in itertools.product(*along))

    def _overlap(self, unit: int) -> tuple[Box, Box]:
        """Return the part of a cube that is not padding, in voxels of the resampled scan and of the cube."""
        inside, within = [], []
        for start, length in zip(self.origin(unit), self.size, strict=True):
            first, end = max(start, 0), min(start + self.side, length)
            inside.append(slice(first, end))
            within.append(slice(first - start, end - start))
        return (inside[0], inside[1], inside[2]), (within[0], within[1], within[2])


@runtime_checkable
class CubeFeatures(Protocol):
    """What a 3D generalist must also offer if its card says that its embeddings are feature maps of cubes.

    Each embedding is a map of features (C, S, S, S) over its whole cube.
    """

    def lattice(self, grid: VolumeGrid) -> CropLattice:
        """Return the cubes into which it cuts a scan."""


@dataclass(frozen=True)
class CropPrompts:
    """The clicks in one cube.

    Attributes:
        positions: in voxels of the cube, in tensor axis order; whole numbers are voxel centres.
        positive: for each click, whether it is on the target.
    """

    positions: tuple[Place, ...] = ()
    positive: tuple[bool, ...] = ()


def crop_prompts(lattice: CropLattice, prompts: Prompts) -> dict[int, CropPrompts]:
    """Find the cubes that answer a prompt set, and the clicks in each.

    The cubes cover the positive clicks and the mask's foreground (above 0.5). They also cover the negative clicks if a
    single cube covers everything, since negative clicks do not justify encoding more. Cubes without a positive click or
    mask foreground are left out.

    Returns:
        unit -> its clicks, in ascending order; empty if there is neither a positive click nor mask foreground.

    Raises:
        ValueError: a click is outside the scan, or the mask has another shape.
    """
    places = [lattice.place(point) for point in prompts.points]
    positive = [point.positive for point in prompts.points]
    foreground = _foreground(prompts.mask, lattice.grid.shape)
    target = [place for place, on_target in zip(places, positive, strict=True) if on_target]
    target += _corners(foreground, lattice)
    if not target:
        return {}
    cubes = lattice.cover(*_bounds(target + places))
    if len(cubes) > 1:
        cubes = lattice.cover(*_bounds(target))
    found: dict[int, CropPrompts] = {}
    for unit in cubes:
        clicks = _clicks_in(lattice.origin(unit), lattice.side, places, positive)
        if any(clicks.positive) or (foreground is not None and bool(foreground[lattice.window(unit)].any())):
            found[unit] = clicks
    return found


def axis_starts(length: int, side: int) -> tuple[int, ...]:
    """Return where cubes start along an axis of this many voxels."""
    if length <= side:
        return (-(side - length) // 2,)
    last = length - side
    return (*range(0, last, max(1, side // _OVERLAP)), last)


def axis_cover(low: float, high: float, starts: Sequence[int], side: int) -> list[int]:
    """Return the indices of the cubes along one axis that cover the interval from low to high.

    If single cubes can, the one whose centre is nearest to the interval's. Otherwise the smallest number of cubes that
    can, placed so that the margins at both ends are about as wide as the overlaps.
    """
    fitting = [index for index, start in enumerate(starts) if start <= low and high <= start + side]
    if fitting:
        return [min(fitting, key=lambda index: abs(starts[index] + side / 2 - (low + high) / 2))]
    pieces = 1
    while True:  # terminates: with enough pieces, every cube between the two ends is chosen
        pieces += 1
        margin = (pieces * side - (high - low)) / (pieces + 1)
        wished = [low - margin + piece * (side - margin) for piece in range(pieces)]
        chosen = sorted({min(range(len(starts)), key=lambda index: abs(starts[index] - wish)) for wish in wished})
        if _covers(low, high, [starts[index] for index in chosen], side):
            return chosen


def _covers(low: float, high: float, starts: Sequence[int], side: int) -> bool:
    touching = all(after <= before + side for before, after in itertools.pairwise(starts))
    return touching and starts[0] <= low and high <= starts[-1] + side


def _clicks_in(origin: Shape, side: int, places: Sequence[Place], positive: Sequence[bool]) -> CropPrompts:
    inside = [
        ((place[0] - origin[0] - 0.5, place[1] - origin[1] - 0.5, place[2] - origin[2] - 0.5), on_target)
        for place, on_target in zip(places, positive, strict=True)
        if all(start <= at <= start + side for at, start in zip(place, origin, strict=True))
    ]
    return CropPrompts(tuple(position for position, _ in inside), tuple(on_target for _, on_target in inside))


def _foreground(mask: Tensor | None, shape: Shape) -> Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, but the scan has {shape}")
    return mask > 0.5


def _corners(foreground: Tensor | None, lattice: CropLattice) -> list[Place]:
    """Return two opposite corners of the foreground's bounding box in the resampled scan; none if it is empty."""
    if foreground is None or not bool(foreground.any()):
        return []
    low, high = [], []
    for axis, (scale, length) in enumerate(zip(lattice.scale, lattice.size, strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        present = foreground.any(dim=others).nonzero()[:, 0]
        low.append(int(present[0]) * scale)
        high.append(min((int(present[-1]) + 1) * scale, length))
    return [(low[0], low[1], low[2]), (high[0], high[1], high[2])]


def _bounds(places: Sequence[Place]) -> tuple[Place, Place]:
    low, high = ([pick(axis) for axis in zip(*places, strict=True)] for pick in (min, max))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def _resize(volume: Tensor, shape: Shape) -> Tensor:
    return F.interpolate(volume[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0]
