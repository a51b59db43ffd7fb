"""Where in a scan a training patch lies, and cutting it out: the rest is neither padded, copied nor read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from semisam_core.data.scans import StoredVolume

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """A box of a scan, and the zeros around it where the scan is smaller than the patch.

    Attributes:
        box: from and to along each axis, inside the scan.
        padding: zeros before and behind, along each axis.
    """

    box: tuple[slice, slice, slice]
    padding: tuple[tuple[int, int], ...]

    def cut(self, volume: Tensor | StoredVolume) -> Tensor:
        """Return the patch of a volume (C, H, W, D)."""
        inside = volume[(slice(None), *self.box)]
        pads = [side for pair in reversed(self.padding) for side in pair]
        return functional.pad(inside, pads) if any(pads) else inside.clone()


class Background:
    """The numbers of all voxels that are not foreground, in order, without listing them.

    Args:
        foreground: the numbers of the foreground's voxels, ascending.
        count: number of voxels.
    """

    def __init__(self, foreground: NDArray[np.int64], count: int) -> None:
        self._before = foreground - np.arange(len(foreground))  # background voxels before each foreground voxel
        self._length = count - len(foreground)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> int:
        return number + int(np.searchsorted(self._before, number, side="right"))


def draw_place(shape: Shape, patch: Shape, foreground: Tensor, crop: Any) -> Place:
    """Return where the next patch lies, as MONAI's transform draws it in a scan padded to at least the patch.

    Args:
        shape: (H, W, D) of the scan.
        patch: (h, w, d).
        foreground: (N, 3) voxels in array order; none if the patch may lie anywhere.
        crop: `RandCropByPosNegLabeld` if there is foreground, else `RandSpatialCropd`, seeded.
    """
    missing = [max(side - have, 0) for side, have in zip(patch, shape, strict=True)]
    before = [each // 2 for each in missing]
    padded = [have + each for have, each in zip(shape, missing, strict=True)]
    if len(foreground):
        moved = (foreground + torch.tensor(before)).numpy()
        numbers = np.ravel_multi_index((moved[:, 0], moved[:, 1], moved[:, 2]), padded)
        nothing = torch.zeros(1).expand(1, *padded)  # only its shape is used
        crop.randomize(nothing, numbers, Background(numbers, int(np.prod(padded))))
        starts = [max(int(c) - side // 2, 0) for c, side in zip(crop.cropper.centers[0], patch, strict=True)]
    else:
        crop.randomize(padded)
        starts = [int(part.start) for part in crop.cropper._slices]
    return _place(shape, patch, before, starts)


def _place(shape: Shape, patch: Shape, before: Sequence[int], starts: Sequence[int]) -> Place:
    box, padding = [], []
    for have, side, ahead, start in zip(shape, patch, before, starts, strict=True):
        first, end = start - ahead, start - ahead + side
        box.append(slice(max(first, 0), min(end, have)))
        padding.append((max(-first, 0), max(end - have, 0)))
    return Place((box[0], box[1], box[2]), tuple(padding))
