"""A scan turned so that slice-wise models cut it along another axis, and their answers turned back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from semisam_core.generalists.base import VolumeGrid
from semisam_core.generalists.embedding_store import scan_key
from semisam_core.prompting import Region
from semisam_core.scratch import BLOCK, Scratch

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
        self._axis, self._shape = axis, tuple(volume.shape)
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
        """Turn a volume (H, W, D) on the scan's grid to this view, without a copy."""
        return volume.movedim(self._axis, -1)

    def turn_region(self, region: Region) -> Region:
        """Turn a region on the scan's grid to this view, without a copy."""
        mask, others = (np.moveaxis(each, self._axis, -1) for each in (region.mask, region.others))
        return replace(region, mask=mask, others=others, spacing_mm=self.grid.spacing_mm)

    def of_slices(
        self,
        make: Callable[[int], Tensor],
        slices: Sequence[int],
        step: int,
        sigma: float,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Return a map on the scan's grid of what is known on some slices; see `complete`.

        Args:
            make: returns the n-th of the slices, (H, W).
        """
        answered = torch.zeros(self.grid.shape)
        for n, index in enumerate(slices):
            answered[:, :, index] = make(n)
            if scratch is not None:
                scratch.release()
        return self.complete(answered, slices, step, sigma, scratch)

    def complete(
        self, answered: Tensor, slices: Iterable[int], step: int, sigma: float, scratch: Scratch | None = None
    ) -> Tensor:
        """Interpolate between answered slices, smooth over slices, and turn back to the scan's grid, row by row.

        Args:
            answered: probability (H, W, D) in this view.
            slices: see `fill_between`.
            step: see `fill_between`.
            sigma: see `smooth_over_slices`.
            scratch: where to make the result; None for memory.
        """
        scratch, known = scratch or Scratch(), set(slices)
        found = scratch.zeros(self._shape)
        turned = self.turn(found)
        rows = max(1, BLOCK // answered[0].numel())
        for start in range(0, len(answered), rows):
            filled = fill_between(answered[start : start + rows], known, step)
            turned[start : start + rows] = smooth_over_slices(filled, sigma)
            scratch.release()
        return found


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
