"""Resampling block by block, so that no temporary array is as large as the scan.

MONAI computes the sampling positions of all voxels at once: seven numbers per voxel, three and four at a time, beside
the scan and its copies. Here they are computed for a block of planes. The arithmetic is MONAI's (`SpatialResample` with
`align_corners=False`), operation by operation, so results are equal bit by bit; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.utils import to_norm_affine
from monai.transforms.utils_pytorch_numpy_unification import allclose
from torch import Tensor
from torch.nn import functional

from semisam_core.data.geometry import Geometry
from semisam_core.scratch import Scratch

BLOCK_BYTES = 64 * 2**20
_POSITION_NUMBERS = 7  # per voxel: four homogeneous coordinates, three positions
_UNCHANGED = 1e-3  # MONAI's tolerance, below which it does not resample


@dataclass(frozen=True)
class Block:
    """Planes `start` to `stop` of the target along one of its axes."""

    axis: int
    start: int
    stop: int

    def of(self, volume: Tensor) -> Tensor:
        """Return these planes of a volume (..., X, Y, Z), a view."""
        return volume.narrow(volume.dim() - 3 + self.axis, self.start, self.stop - self.start)


class GridChange:
    """The change from a source grid to a target grid.

    Args:
        source: the grid to sample.
        target: the grid whose voxels are computed.
    """

    def __init__(self, source: Geometry, target: Geometry) -> None:
        self.source, self.target = source.shape, target.shape
        change = torch.from_numpy(np.linalg.solve(source.affine.double().numpy(), target.affine.double().numpy()))
        pairs = ((source.affine, target.affine), (change, torch.eye(4)))
        near = any(bool(allclose(one, other, atol=_UNCHANGED)) for one, other in pairs)
        self.unchanged = source.shape == target.shape and near
        matrix = to_norm_affine(change.float()[None], self.source, self.target, align_corners=False)[0]
        self._matrix = matrix[[2, 1, 0]][:, [2, 1, 0, 3]]  # rows and columns in grid_sample's order: z, y, x

    @property
    def axis_of_rows(self) -> int:
        """The target's axis along which the source's first axis changes most."""
        return 2 - int(self._matrix[2, :3].abs().argmax())

    def blocks(self, axis: int, bytes_per_voxel: int) -> Iterator[Block]:
        """Return the target's blocks along an axis, each of about `BLOCK_BYTES` with its positions."""
        sides = list(self.target)
        length = sides.pop(axis)
        planes = max(1, BLOCK_BYTES // (sides[0] * sides[1] * (bytes_per_voxel + 4 * _POSITION_NUMBERS)))
        return (Block(axis, start, min(start + planes, length)) for start in range(0, length, planes))

    def positions(self, block: Block) -> Tensor:
        """Return where the block's voxels lie in the source, as grid_sample takes it: (1, x, y, z, 3) float32."""
        ranges = [slice(None)] * 3
        ranges[block.axis] = slice(block.start, block.stop)
        x, y, z = (_normalised(side)[part] for side, part in zip(self.target, ranges, strict=True))
        base = torch.ones((len(x), len(y), len(z), 4))
        base[..., 0], base[..., 1], base[..., 2] = z, y[:, None], x[:, None, None]
        found = base.view(1, -1, 4).bmm(self._matrix.T[None])
        return found.view(1, len(x), len(y), len(z), 3)

    def source_rows(self, block: Block) -> tuple[int, int]:
        """Return the planes of the source's first axis, from and to (exclusive), that sampling a block may read."""
        corners = [[(0, side - 1), (block.start, block.stop - 1)][axis == block.axis] for axis, side in self._sides()]
        points = torch.cartesian_prod(*(torch.tensor(ends) for ends in corners))
        scaled = torch.stack([_normalised(side)[points[:, axis]] for axis, side in self._sides()])
        first = self._matrix[2].double() @ torch.cat([scaled.flip(0), torch.ones((1, len(points)))]).double()
        rows = ((first + 1) * self.source[0] - 1) / 2
        last = self.source[0] - 1
        lowest, highest = int(rows.min().floor()) - 1, int(rows.max().ceil()) + 1  # one to spare, for rounding
        # Past the edge its own row is read, and the next one with weight 0.
        return min(max(lowest, 0), max(last - 1, 0)), min(max(highest, 1), last) + 1

    def sample(self, maps: Tensor, block: Block, mode: str = "bilinear") -> Tensor:
        """Return maps (K, H, W, D) float32 of the source, at the block's voxels: (K, x, y, z)."""
        return functional.grid_sample(
            maps[None], self.positions(block), mode=mode, padding_mode="border", align_corners=False
        )[0]

    def _sides(self) -> list[tuple[int, int]]:
        return list(enumerate(self.target))


def resample_blocks(
    maps: Tensor, source: Geometry, target: Geometry, mode: str = "bilinear", scratch: Scratch | None = None
) -> Tensor:
    """Resample maps from one grid to another; outside the source, its edge values continue.

    Args:
        maps: (K, H, W, D), float32 on the CPU.
        source: their grid.
        target: the grid to compute.
        mode: bilinear or nearest.
        scratch: where the maps are and the result will be; None for memory.

    Returns:
        (K, X, Y, Z) float32; the maps themselves if the grids are the same.
    """
    change = GridChange(source, target)
    if change.unchanged:
        return maps
    scratch = scratch or Scratch()
    found = scratch.zeros((len(maps), *target.shape))
    for block in change.blocks(0, 4 * len(maps)):
        block.of(found).copy_(change.sample(maps, block, mode))
        scratch.release()
    return found


def _normalised(side: int) -> Tensor:
    """Return the centres of the voxels of one axis in [-1, 1], as torch's affine_grid computes them."""
    return torch.linspace(-1, 1, side) * (side - 1) / side if side > 1 else torch.zeros(1)
