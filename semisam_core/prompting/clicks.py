"""Clicks: where to put the next one, and many at once along a skeleton.

All functions take 2D or 3D masks and return positions as voxel indices; a slice-wise model is clicked on one slice at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import skeletonize

from semisam_core.components import Mask, largest_component

Position = tuple[int, ...]


def deepest_voxel(mask: Mask, spacing_mm: Sequence[float]) -> Position:
    """Return the voxel of a mask that is farthest from its border; of equals, the one nearest to the mask's centre.

    The edge of the scan counts as border, since a click at the very edge is a poor one.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("an empty mask has no voxel to click on")
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=tuple(spacing_mm))
    inner = depth[tuple(slice(1, -1) for _ in range(mask.ndim))]
    deepest = np.argwhere(inner >= inner.max() - 1e-9)
    apart = (((deepest - np.argwhere(mask).mean(0)) * spacing_mm) ** 2).sum(1)
    return tuple(int(index) for index in deepest[apart.argmin()])


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
    candidates = []
    for positive in (True, False):
        component = largest_component(wrong & (region == positive))
        candidates.append((int(component.sum()), component, positive))
    _, component, positive = max(candidates, key=lambda candidate: candidate[0])
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
