"""Connected components of masks. Voxels connect across faces, edges and corners: 26 neighbours in 3D, 8 in 2D."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def largest_component(mask: Mask) -> Mask:
    """Return the largest component of a mask; of equally large ones, the one that comes first in array order."""
    labels, sizes = _label(mask)
    if len(sizes) <= 2:
        return mask
    first = int(sizes[labels].argmax())  # the first voxel of any component of the greatest size
    kept: Mask = labels == labels.ravel()[first]
    return kept


def meaningful_components(mask: Mask, share: float) -> Mask:
    """Return the components that have at least `share` of the largest one's voxels."""
    labels, sizes = _label(mask)
    if len(sizes) <= 2:
        return mask
    kept: Mask = (sizes >= share * sizes.max())[labels] & mask
    return kept


def separate_components(mask: Mask, share: float, limit: int) -> list[Mask]:
    """Return each meaningful component as a mask of its own, largest first.

    Args:
        mask: 2D or 3D; may be empty.
        share: components with less than this share of the largest one's voxels are left out.
        limit: the most components to return.
    """
    labels, sizes = _label(mask)
    order = np.argsort(-sizes[1:], kind="stable") + 1
    return [labels == number for number in order[:limit] if sizes[number] >= share * sizes[order[0]]]


def component_sizes(mask: Mask) -> NDArray[np.int64]:
    """Return the number of voxels of every component, largest first; empty without one."""
    sizes = _label(mask)[1][1:]
    return np.sort(sizes)[::-1]


def _label(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the number of each voxel's component (0 for background), and each component's voxels; none of 0."""
    labels, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return labels, sizes
