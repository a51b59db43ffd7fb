"""A scan turned so that slice-wise models cut it along another axis, and their answers brought back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from scipy import ndimage
from torch import Tensor

from semisam_core.generalists.base import VolumeGrid
from semisam_core.generalists.embedding_store import scan_key
from semisam_core.prompting import Region

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}  # scans are in RAS orientation


class View:
    """A scan with one of its axes turned to the last place, along which slice-wise models cut it.

    Args:
        volume: the scan's first channel (H, W, D), RAS.
        spacing_mm: voxel size.
        axis: the axis that becomes the last one; see `AXES`.
    """

    def __init__(self, volume: Tensor, spacing_mm: tuple[float, float, float], axis: int) -> None:
        self._axis = axis
        self.volume = self.turn(volume)
        height, width, depth = self.volume.shape
        kept = [spacing_mm[other] for other in range(3) if other != axis]
        self.grid = VolumeGrid((int(height), int(width), int(depth)), (kept[0], kept[1], spacing_mm[axis]))

    @cached_property
    def key(self) -> str:
        """The scan's key in the embedding store."""
        return scan_key(self.volume)

    def step(self, step_mm: float) -> int:
        """Return every how many slices are this far apart, at least every one."""
        return max(1, round(step_mm / self.grid.spacing_mm[2]))

    def turn(self, volume: Tensor) -> Tensor:
        """Turn a volume (H, W, D) as the scan is turned."""
        return volume.movedim(self._axis, -1).contiguous()

    def turn_back(self, volume: Tensor) -> Tensor:
        """Undo `turn`."""
        return volume.movedim(-1, self._axis).contiguous()

    def turn_region(self, region: Region) -> Region:
        """Turn what generalists are prompted with as the scan is turned."""
        mask, others = (self.turn(torch.from_numpy(each)).numpy() for each in (region.mask, region.others))
        return Region(mask, others, self.grid.spacing_mm)


def fill_between(probability: Tensor, answered: Iterable[int], step: int) -> Tensor:
    """Interpolate along the last axis between slices that were answered and lie `step` apart.

    A slice between an answered and an unanswered neighbour of the lattice fades towards 0.
    """
    if step == 1:
        return probability
    filled = probability.clone()
    known = set(answered)
    for index in range(probability.shape[-1]):
        before = index - index % step
        if index in known or not {before, before + step} & known:
            continue
        share = (index - before) / step
        after = probability[..., before + step] if before + step in known else 0.0
        filled[..., index] = (1 - share) * (probability[..., before] if before in known else 0.0) + share * after
    return filled


def smooth_over_slices(probability: Tensor, sigma: float) -> Tensor:
    """Smooth along the last axis with a Gaussian of this many slices."""
    if sigma <= 0:
        return probability
    return torch.from_numpy(ndimage.gaussian_filter1d(probability.numpy(), sigma, axis=-1, mode="nearest"))
