"""What the specialist says of one class of one scan, as far as it can be prompted with, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from semisam_core.plan_sections.pseudo_labels import Gates, Prompting

Mask = NDArray[np.bool_]


class Refusal(StrEnum):
    """Why a scan got no pseudo-label for a class. These words, and no others, may be reported."""

    EMPTY = "empty"
    TOO_SMALL = "too-small"
    TOO_LARGE = "too-large"
    IMPLAUSIBLE = "implausible-volume"
    LOW_QUALITY = "low-quality"
    LOW_CONFIDENCE = "low-confidence"
    DISAGREEMENT = "disagreement"
    FAILED = "failed"


@dataclass(frozen=True)
class Region:
    """The prompted part of one class.

    Attributes:
        mask: (H, W, D) bool, its meaningful components.
        others: (H, W, D) bool, foreground of the other classes; empty where there are none.
        spacing_mm: voxel size along H, W, D.
    """

    mask: Mask
    others: Mask
    spacing_mm: tuple[float, float, float]

    def grown(self, margin_mm: float) -> Region:
        """Return the region with its surface moved outwards by a distance, or inwards where it is negative.

        It never shrinks to less than the core that lies deeper than half of its greatest depth, so that something
        is left to prompt with.
        """
        if margin_mm == 0:
            return self
        if margin_mm > 0:
            moved = ndimage.distance_transform_edt(~self.mask, sampling=self.spacing_mm) <= margin_mm
        else:
            depth = ndimage.distance_transform_edt(self.mask, sampling=self.spacing_mm)
            moved = depth > min(-margin_mm, depth.max() / 2)
        return Region(moved, self.others & ~moved, self.spacing_mm)


def find_region(
    probability: Tensor, spacing_mm: Sequence[float], prompting: Prompting, gates: Gates, others: Tensor | None = None
) -> Region | Refusal:
    """Binarise a class's foreground probability and keep its meaningful connected components.

    Args:
        probability: foreground probability of one class (H, W, D), in [0, 1].
        spacing_mm: voxel size along H, W, D.
        prompting: threshold and components.
        gates: the volume a region must have.
        others: (H, W, D) bool, where the specialist sees other classes.
    """
    mask: Mask = (probability > prompting.threshold).numpy()
    if not mask.any():
        return Refusal.EMPTY
    kept = meaningful_components(mask, prompting.component_share)
    if refusal := volume_refusal(float(kept.sum()), spacing_mm, gates):
        return refusal
    foreign = np.zeros_like(kept) if others is None else others.numpy() & ~kept
    height, width, depth = spacing_mm
    return Region(kept, foreign, (float(height), float(width), float(depth)))


def volume_refusal(voxels: float, spacing_mm: Sequence[float], gates: Gates) -> Refusal | None:
    """Return why a volume of so many voxels is not accepted, or None."""
    millilitres = voxels * float(np.prod(spacing_mm)) / 1000
    if millilitres < gates.minimum_volume_ml:
        return Refusal.TOO_SMALL
    return Refusal.TOO_LARGE if millilitres > gates.maximum_volume_ml else None


def meaningful_components(mask: Mask, share: float) -> Mask:
    """Keep the components (connected also by edges and corners) of at least `share` of the largest one's size."""
    labels, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: Mask = (sizes >= share * sizes.max())[labels] & mask
    return kept
