"""A scan turned so that slice-wise models cut it along another axis, and their answers turned back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
from scipy import ndimage
from torch import Tensor

from semisam_core.generalists.base import VolumeGrid
from semisam_core.generalists.embedding_store import scan_key
from semisam_core.prompting import Region

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}  # scans are in RAS orientation


class View:
    """A scan with one of its axes moved last, the axis along which slice-wise models cut it.

    Attributes:
        volume: the turned scan.
        grid: its shape and voxel size.
    """

    def __init__(self, volume: Tensor, spacing_mm: tuple[float, float, float], axis: int) -> None:
        """Turn a scan.

        Args:
            volume: the scan's first channel (H, W, D), RAS.
            spacing_mm: voxel size along H, W, D.
            axis: the axis to move last; see `AXES`.
        """
        self._axis = axis
        self.volume = self.turn(volume)
        height, width, depth = self.volume.shape
        in_plane = [spacing_mm[other] for other in range(3) if other != axis]
        self.grid = VolumeGrid((int(height), int(width), int(depth)), (in_plane[0], in_plane[1], spacing_mm[axis]))

    @cached_property
    def key(self) -> str:
        """The turned scan's key in the embedding store."""
        return scan_key(self.volume)

    def slice_step(self, step_mm: float) -> int:
        """Convert a distance between slices from millimetres to whole slices, at least 1."""
        return max(1, round(step_mm / self.grid.spacing_mm[2]))

    def turn(self, volume: Tensor) -> Tensor:
        """Turn a volume (H, W, D) on the scan's grid to this view."""
        return volume.movedim(self._axis, -1).contiguous()

    def turn_back(self, volume: Tensor) -> Tensor:
        """Undo `turn`."""
        return volume.movedim(-1, self._axis).contiguous()

    def turn_region(self, region: Region) -> Region:
        """Turn a region on the scan's grid to this view."""
        mask, others = (self.turn(torch.from_numpy(each)).numpy() for each in (region.mask, region.others))
        return replace(region, mask=mask, others=others, spacing_mm=self.grid.spacing_mm)


def fill_between(probability: Tensor, answered: Iterable[int], step: int) -> Tensor:
    """Interpolate linearly between answered slices of a regular lattice.

    A slice with only one answered neighbour on the lattice fades towards 0 on the other side.

    Args:
        probability: (..., D), filled on the answered slices.
        answered: slice numbers along the last axis.
        step: the lattice is every `step`-th slice, from 0.
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
    """Smooth along the last axis with a Gaussian whose standard deviation is given in slices; 0 leaves it as it is."""
    if sigma <= 0:
        return probability
    return torch.from_numpy(ndimage.gaussian_filter1d(probability.numpy(), sigma, axis=-1, mode="nearest"))
