"""Distances inside a mask, row by row: `scipy.ndimage.distance_transform_edt` needs twelve float32 maps at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from semisam_core.components import Mask
from semisam_core.scratch import BLOCK


class BorderDistances:
    """The distance of each voxel of a mask to the nearest one outside it, as scipy computes it, bit by bit.

    Args:
        mask: of any number of axes.
        spacing_mm: voxel size along each.
    """

    def __init__(self, mask: Mask, spacing_mm: Sequence[float]) -> None:
        self._spacing = np.array(spacing_mm, dtype=np.float64)
        self._nearest = np.zeros((mask.ndim, *mask.shape), np.int32)
        ndimage.distance_transform_edt(
            mask, sampling=tuple(spacing_mm), return_distances=False, return_indices=True, indices=self._nearest
        )

    def __iter__(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield some rows along the first axis and their distances; 0 outside the mask."""
        _, length, *sides = self._nearest.shape
        rows = max(1, BLOCK // math.prod(sides))
        for start in range(0, length, rows):
            part = slice(start, min(start + rows, length))
            yield part, self._of(part)

    def _of(self, rows: slice) -> NDArray[np.float64]:
        nearest = self._nearest[:, rows]
        squared = np.zeros(nearest.shape[1:])
        for axis, (places, side) in enumerate(zip(nearest, self._spacing, strict=True)):
            own = np.arange(places.shape[axis], dtype=np.int32) + np.int32(rows.start if axis == 0 else 0)
            along = (places - own.reshape([-1 if each == axis else 1 for each in range(places.ndim)])) * side
            squared += along * along
        return np.sqrt(squared, out=squared)
