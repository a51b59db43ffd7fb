"""Where a frozen encoder's features lie in a scan: slices of a 2D model and cubes of a 3D one alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from semisam_core.generalists.base import VolumeGrid
from semisam_core.generalists.crops import CropLattice
from semisam_core.generalists.embedding_store import scan_key
from semisam_core.generalists.slices import FeatureMaps
from semisam_core.pseudo_labels.views import View
from semisam_core.scratch import Scratch


class FeatureSpace(Protocol):
    """The features of one scan: one map for each embedding unit, with *S either two sides (slices) or three (cubes)."""

    @property
    def key(self) -> str:
        """The scan's key in the embedding store."""

    @property
    def volume(self) -> Tensor:
        """The scan as the generalist is given it, (H, W, D)."""

    @property
    def grid(self) -> VolumeGrid:
        """Its voxels."""

    @property
    def units(self) -> tuple[int, ...]:
        """The units that cover the scan, N of them."""

    def features(self, embeddings: Mapping[int, Tensor], scratch: Scratch) -> Tensor:
        """Return the features (N, C, *S), float32, in scratch."""

    def places(self, side: int) -> Tensor:
        """Return where in the scan each feature lies, from -1 to 1 between its borders, (N, 3, *S)."""

    def shares(self, mask: Tensor, side: int) -> Tensor:
        """Return the share of each feature's patch that a mask (H, W, D), bool, covers, (N, *S)."""

    def spread(self, maps: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Bring one class's maps of features (N, *S) back to the scan, (H, W, D); both in scratch or in memory."""


class PlaneSpace:
    """Features of every n-th slice of a scan in one plane.

    Args:
        volume: the scan's first channel (H, W, D), RAS.
        spacing_mm: voxel size.
        axis: across which slices lie; see `views.AXES`.
        step_mm: distance between the slices that are encoded; what is found on them is interpolated.
        smooth_slices: sigma, in slices, of the Gaussian that then smooths across slices.
        maps: the generalist.
    """

    def __init__(
        self,
        volume: Tensor,
        spacing_mm: tuple[float, float, float],
        axis: int,
        step_mm: float,
        smooth_slices: float,
        maps: FeatureMaps,
    ) -> None:
        self._view = View(volume, spacing_mm, axis)
        self._maps, self._smooth, self._step = maps, smooth_slices, self._view.slice_step(step_mm)
        self.key, self.volume, self.grid = self._view.key, self._view.volume, self._view.grid
        self.units = tuple(range(0, self.grid.shape[2], self._step))

    def features(self, embeddings: Mapping[int, Tensor], scratch: Scratch) -> Tensor:
        """Return the features (N, C, S, S)."""
        return _kept([partial(_feature_map, self._maps, embeddings, unit) for unit in self.units], scratch)

    def places(self, side: int) -> Tensor:
        """Return the place of each feature along the turned scan's axes, the slices' first, (N, 3, S, S)."""
        height, width, depth = self.grid.shape
        framing = self._maps.framing
        rows, columns = (pixels * side / framing.side for pixels in framing.size((height, width)))
        centres = torch.arange(side) + 0.5
        along = [(torch.tensor(self.units) + 0.5) / depth, centres / rows, centres / columns]
        return 2 * torch.stack(torch.meshgrid(*along, indexing="ij"), 1).clamp(0, 1) - 1

    def shares(self, mask: Tensor, side: int) -> Tensor:
        """Return the covered share of each feature's patch; padding is not covered, (N, S, S)."""
        turned = self._view.turn(mask)
        return torch.cat([self._maps.framing.shares(turned[:, :, unit].float()[None], side) for unit in self.units])

    def spread(self, maps: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Bring maps (N, S, S) back to the scan; slices between are interpolated."""
        framing, plane = self._maps.framing, self.grid.shape[:2]

        def on_slice(n: int) -> Tensor:
            return framing.spread(maps[n : n + 1], plane)[0]

        return self._view.of_slices(on_slice, self.units, self._step, self._smooth, scratch)


class CubeSpace:
    """Features of the fewest cubes that cover a scan; an embedding is its cube's map of features.

    Args:
        volume: the scan's first channel (H, W, D), RAS.
        lattice: the generalist's cubes of this scan.
    """

    def __init__(self, volume: Tensor, lattice: CropLattice) -> None:
        self.key, self.volume, self.grid, self._lattice = scan_key(volume), volume, lattice.grid, lattice
        height, width, depth = lattice.size
        self.units = lattice.cover((0.0, 0.0, 0.0), (float(height), float(width), float(depth)))

    def features(self, embeddings: Mapping[int, Tensor], scratch: Scratch) -> Tensor:
        """Return the features (N, C, S, S, S)."""
        return _kept([partial(embeddings.__getitem__, unit) for unit in self.units], scratch)

    def places(self, side: int) -> Tensor:
        """Return the place of each feature along the scan's axes, (N, 3, S, S, S)."""
        centres = (torch.arange(side) + 0.5) * self._lattice.side / side
        found = []
        for unit in self.units:
            starts = zip(self._lattice.origin(unit), self._lattice.size, strict=True)
            along = [(start + centres) / length for start, length in starts]
            found.append(torch.stack(torch.meshgrid(*along, indexing="ij")))
        return 2 * torch.stack(found).clamp(0, 1) - 1

    def shares(self, mask: Tensor, side: int) -> Tensor:
        """Return the covered share of each feature's patch; padding is not covered, (N, S, S, S)."""
        resampled = self._lattice.resample(mask.float())
        cubes = torch.stack([self._lattice.cut(resampled, unit) for unit in self.units])
        return functional.adaptive_avg_pool3d(cubes[:, None], side)[:, 0]

    def spread(self, maps: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Bring maps (N, S, S, S) back to the scan; where cubes overlap, their mean."""
        size = (self._lattice.side,) * 3
        fine = functional.interpolate(maps[:, None], size=size, mode="trilinear", align_corners=False)[:, 0]
        return (scratch or Scratch()).keep(self._lattice.restore(dict(zip(self.units, fine, strict=True))))


def _feature_map(maps: FeatureMaps, embeddings: Mapping[int, Tensor], unit: int) -> Tensor:
    return maps.feature_map(embeddings[unit])


def _kept(makers: Sequence[Callable[[], Tensor]], scratch: Scratch) -> Tensor:
    """Return what was made, stacked in scratch, float32."""
    first = makers[0]()
    found = scratch.zeros((len(makers), *first.shape))
    for place, make in zip(found, makers, strict=True):
        place.copy_(make())
        scratch.release()
    return found
