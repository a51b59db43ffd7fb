"""Connected components of masks. Voxels connect across faces, edges and corners: 26 neighbours in 3D, 8 in 2D."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
_AT_ONCE = 1 << 22  # voxels that are counted at once


def largest_component(mask: Mask) -> Mask:
    """Return the largest component of a mask; of equally large ones, the one that comes first in array order."""
    box, labels, sizes = _label(mask)
    if len(sizes) <= 2:
        return mask
    greatest = sizes == sizes.max()
    for row in labels:  # the first voxel of any component of the greatest size
        if (hits := greatest[row]).any():
            number = row.flat[int(hits.argmax())]
            break
    kept = np.zeros_like(mask)
    kept[box] = labels == number
    return kept


def meaningful_components(mask: Mask, share: float) -> Mask:
    """Return the components that have at least `share` of the largest one's voxels."""
    box, labels, sizes = _label(mask)
    if len(sizes) <= 2:
        return mask
    kept = np.zeros_like(mask)
    kept[box] = (sizes >= share * sizes.max())[labels] & mask[box]
    return kept


def separate_components(mask: Mask, share: float, limit: int) -> Iterator[Mask]:
    """Yield each meaningful component as a mask of its own, largest first.

    Args:
        mask: 2D or 3D; may be empty.
        share: components with less than this share of the largest one's voxels are left out.
        limit: the most components to return, at most 255.
    """
    box, labels, sizes = _label(mask)
    order = np.argsort(-sizes[1:], kind="stable") + 1
    rank = np.zeros(len(sizes), np.uint8)
    chosen = [number for number in order[:limit] if sizes[number] >= share * sizes[order[0]]]
    rank[chosen] = np.arange(1, 1 + len(chosen))
    ranks = rank[labels]
    del labels  # four times as large
    for each in range(1, 1 + len(chosen)):
        part = np.zeros_like(mask)
        part[box] = ranks == each
        yield part


def component_sizes(mask: Mask) -> NDArray[np.int64]:
    """Return the number of voxels of every component, largest first; empty without one."""
    sizes = _label(mask)[2][1:]
    return np.sort(sizes)[::-1]


def bounding_box(mask: Mask, margins: Sequence[int] = ()) -> tuple[slice, ...]:
    """Return the box of a mask's voxels, all of the array if there is none.

    Args:
        mask: of any number of axes.
        margins: voxels to add along each axis, on both sides and within the array; none by default.
    """
    box = []
    for axis, (length, margin) in enumerate(zip(mask.shape, margins or [0] * mask.ndim, strict=True)):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        first, last = (hits[0], hits[-1]) if len(hits) else (0, length - 1)
        box.append(slice(max(0, int(first) - margin), min(length, int(last) + 1 + margin)))
    return tuple(box)


def _label(mask: Mask) -> tuple[tuple[slice, ...], NDArray[np.int32], NDArray[np.int64]]:
    """Return the mask's box, in it each voxel's component (0 for background), and each component's voxels, 0 for 0."""
    box = bounding_box(mask)
    labels, count = ndimage.label(mask[box], structure=np.ones((3,) * mask.ndim))
    sizes = np.zeros(count + 1, np.int64)
    rows = max(1, _AT_ONCE // max(1, labels[0].size))
    for start in range(0, len(labels), rows):  # bincount first makes an int64 of each number
        sizes += np.bincount(labels[start : start + rows].ravel(), minlength=count + 1)
    sizes[0] = 0
    return box, labels, sizes
