"""Where a scan lies in the cubes that a 3D encoder takes, for images, prompts and answers alike.

A scan is resampled to isotropic voxels and cut in cubes on a fixed lattice, so that prompts which move a little find
the cube that is already encoded. A voxel r covers the interval r to r + 1 and edges scale, so the centre of voxel r of
the scan lies at (r + 0.5) * scale. Places are given in these edges; whole voxels of a cube are 0.5 less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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
    """The cubes of one scan. They are numbered along the last axis first; the numbers follow from the grid alone.

    Along an axis that is no longer than a cube there is one cube, centred, and the rest of it is padding. Along a
    longer one, cubes start every quarter of a side, and the last ends with the scan.

    Attributes:
        grid: the scan's voxels.
        side: voxels along each edge of a cube.
        spacing_mm: size of these voxels. The resampled scan keeps its borders and has a whole number of them, so they
            may be larger or smaller by half a voxel over the scan's length.

    Raises:
        ValueError: the grid has no voxels, or a voxel no size.
    """

    grid: VolumeGrid
    side: int
    spacing_mm: float = 1.5

    def __post_init__(self) -> None:
        if min(self.grid.shape) < 1 or not all(math.isfinite(mm) and mm > 0 for mm in self.grid.spacing_mm):
            raise ValueError(
                f"a scan of shape {self.grid.shape} and voxel size {self.grid.spacing_mm} mm cannot be resampled; "
                "accepted are at least one voxel along each axis and sizes above 0"
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
        """Resampled voxels for each voxel of the scan, along each axis."""
        h, w, d = (new / old for new, old in zip(self.size, self.grid.shape, strict=True))
        return h, w, d

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """First resampled voxel of the cubes along each axis; negative where a cube begins with padding."""
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
        """Resample a scan (H, W, D), trilinear; without smoothing beforehand, as SAM-Med3D was trained."""
        return _resize(volume.float(), self.size)

    def cut(self, resampled: Tensor, unit: int) -> Tensor:
        """Cut one cube (side, side, side) out of a resampled scan; padding is 0."""
        inside, within = self._overlap(unit)
        cube = resampled.new_zeros((self.side, self.side, self.side))
        cube[within] = resampled[inside]
        return cube

    def restore(self, cubes: Mapping[int, Tensor]) -> Tensor:
        """Bring answers in cubes back to the scan (H, W, D): their mean where they overlap, 0 outside of them."""
        total, count = torch.zeros(self.size), torch.zeros(self.size)
        for unit, cube in cubes.items():
            inside, within = self._overlap(unit)
            total[inside] += cube[within]
            count[inside] += 1
        return _resize(total / count.clamp_min(1), self.grid.shape)

    def window(self, unit: int) -> Box:
        """Return where the scan's voxels lie whose centres are in a cube."""
        first, middle, last = (
            slice(
                max(0, math.ceil(start / scale - 0.5)),
                max(0, min(length, math.ceil((start + self.side) / scale - 0.5))),
            )
            for start, scale, length in zip(self.origin(unit), self.scale, self.grid.shape, strict=True)
        )
        return first, middle, last

    def cover(self, low: Place, high: Place) -> tuple[int, ...]:
        """Return the cubes that cover a box, ascending: one where one can, else few, evenly spread over the box."""
        along = [axis_cover(a, b, starts, self.side) for a, b, starts in zip(low, high, self.starts, strict=True)]
        _, width, depth = (len(starts) for starts in self.starts)
        return tuple((i * width + j) * depth + k for i, j, k in itertools.product(*along))

    def _overlap(self, unit: int) -> tuple[Box, Box]:
        """Return the part of a cube that is scan: in voxels of the resampled scan, and of the cube."""
        inside, within = [], []
        for start, length in zip(self.origin(unit), self.size, strict=True):
            first, end = max(start, 0), min(start + self.side, length)
            inside.append(slice(first, end))
            within.append(slice(first - start, end - start))
        return (inside[0], inside[1], inside[2]), (within[0], within[1], within[2])


@dataclass(frozen=True)
class CropPrompts:
    """The clicks in one cube.

    Attributes:
        positions: in voxels of the cube, tensor axis order; whole numbers are voxel centres.
        positive: for each, whether the target is there.
    """

    positions: tuple[Place, ...] = ()
    positive: tuple[bool, ...] = ()


def crop_prompts(lattice: CropLattice, prompts: Prompts) -> dict[int, CropPrompts]:
    """Find the cubes that answer a prompt set, and the clicks in each.

    The cubes cover the positive clicks and the mask's foreground (above 0.5), and the negative clicks too if that takes
    no second cube: what is not the target is no reason to encode more. Cubes with nothing positive are left out.

    Returns:
        unit -> its clicks, ascending; empty if nothing positive was asked.

    Raises:
        ValueError: a click is outside the scan, or the mask has another shape.
    """
    places = [lattice.place(point) for point in prompts.points]
    positive = [point.positive for point in prompts.points]
    foreground = _foreground(prompts.mask, lattice.grid.shape)
    asked = [place for place, sure in zip(places, positive, strict=True) if sure]
    asked += _corners(foreground, lattice)
    if not asked:
        return {}
    cubes = lattice.cover(*_bounds(asked + places))
    if len(cubes) > 1:
        cubes = lattice.cover(*_bounds(asked))
    found: dict[int, CropPrompts] = {}
    for unit in cubes:
        clicks = _clicks_in(lattice.origin(unit), lattice.side, places, positive)
        if any(clicks.positive) or (foreground is not None and bool(foreground[lattice.window(unit)].any())):
            found[unit] = clicks
    return found


def axis_starts(length: int, side: int) -> tuple[int, ...]:
    """Return where cubes begin along an axis of so many voxels."""
    if length <= side:
        return (-(side - length) // 2,)
    last = length - side
    return (*range(0, last, max(1, side // _OVERLAP)), last)


def axis_cover(low: float, high: float, starts: Sequence[int], side: int) -> list[int]:
    """Return the indices of the cubes along one axis that cover low to high.

    One whose centre is nearest to the middle, where one cube can; otherwise as few as lie on the lattice with margins
    at both ends as wide as their overlaps.
    """
    fitting = [index for index, start in enumerate(starts) if start <= low and high <= start + side]
    if fitting:
        return [min(fitting, key=lambda index: abs(starts[index] + side / 2 - (low + high) / 2))]
    pieces = 1
    while True:  # ends: with enough pieces every cube between the two ends is chosen
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
        ((place[0] - origin[0] - 0.5, place[1] - origin[1] - 0.5, place[2] - origin[2] - 0.5), sure)
        for place, sure in zip(places, positive, strict=True)
        if all(start <= at <= start + side for at, start in zip(place, origin, strict=True))
    ]
    return CropPrompts(tuple(position for position, _ in inside), tuple(sure for _, sure in inside))


def _foreground(mask: Tensor | None, shape: Shape) -> Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the scan {shape}")
    return mask > 0.5


def _corners(foreground: Tensor | None, lattice: CropLattice) -> list[Place]:
    """Return the two outermost corners of the foreground's voxels in the resampled scan; none if it is empty."""
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
