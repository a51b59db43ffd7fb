"""Clicks: where to put the next one, and many at once along a skeleton.

All functions take 2D or 3D masks and return positions as voxel indices; a slice-wise model is clicked on one slice at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import skeletonize

from semisam_core.components import Mask, bounding_box, largest_component
from semisam_core.prompting.depth import BorderDistances

Position = tuple[int, ...]


def deepest_voxel(mask: Mask, spacing_mm: Sequence[float]) -> Position:
    """Return the voxel of a mask that is farthest from its border; of equals, the one nearest to the mask's centre.

    The edge of the scan counts as border, since a click at the very edge is a poor one.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("an empty mask has no voxel to click on")
    box = bounding_box(mask)
    corner = [side.start for side in box]
    greatest, found = 0.0, []
    for rows, depth in BorderDistances(np.pad(mask[box], 1), spacing_mm):
        greatest = max(greatest, float(depth.max()))
        places = np.argwhere(depth >= greatest - 1e-9)
        found.append((places + np.eye(1, mask.ndim, dtype=np.int64) * rows.start, depth[tuple(places.T)]))
    places, depths = (np.concatenate(each) for each in zip(*found, strict=True))
    deepest = places[depths >= greatest - 1e-9] - 1 + corner
    apart = (((deepest - _centre(mask[box], corner)) * spacing_mm) ** 2).sum(1)
    return tuple(int(index) for index in deepest[apart.argmin()])


def _centre(mask: Mask, corner: Sequence[int]) -> NDArray[np.float64]:
    """Return the mean index of a mask's voxels along each axis, counted from a corner."""
    sums = []
    for axis, first in enumerate(corner):
        along = mask.sum(axis=tuple(other for other in range(mask.ndim) if other != axis))
        sums.append(int((along * (first + np.arange(len(along)))).sum()))
    return np.array(sums, dtype=np.float64) / int(np.count_nonzero(mask))


def next_click(answer: Mask, region: Mask, spacing_mm: Sequence[float]) -> tuple[Position, bool] | None:
    """Return the next click: the deepest voxel of the largest component where answer and region differ.

    Args:
        answer: the generalist's last mask; all False before the first click.
        region: the specialist's mask.
        spacing_mm: voxel size along each axis.

    Returns:
        (position, positive), positive where the specialist has foreground that the answer lacks; None where the two
        agree.
    """
    wrong = answer != region
    if not wrong.any():
        return None
    component, positive = largest_component(wrong & region), True
    other = largest_component(wrong & ~region)
    if np.count_nonzero(other) > np.count_nonzero(component):
        component, positive = other, False
    del wrong, other
    return deepest_voxel(component, spacing_mm), positive


def scribble(mask: Mask, count: int) -> list[Position]:
    """Return up to `count` voxels spread evenly along the mask's skeleton: clicks for targets that are not compact."""
    skeleton: Mask = skeletonize(mask) > 0  # type: ignore[no-untyped-call]
    voxels: NDArray[np.int64] = np.argwhere(skeleton if skeleton.any() else mask)
    if len(voxels) <= count:
        return [tuple(int(index) for index in voxel) for voxel in voxels]
    return [tuple(int(index) for index in voxels[k]) for k in _spread(voxels, count)]


def _spread(voxels: NDArray[np.int64], count: int) -> list[int]:
    """Choose voxels one at a time, each farthest from those already chosen (farthest-point sampling)."""
    chosen = [int(((voxels - voxels.mean(0)) ** 2).sum(1).argmin())]
    apart = ((voxels - voxels[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        chosen.append(int(apart.argmax()))
        apart = np.minimum(apart, ((voxels - voxels[chosen[-1]]) ** 2).sum(1))
    return chosen
