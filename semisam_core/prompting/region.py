"""The region of one class that prompts the generalists, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from torch import Tensor

from semisam_core.components import (
    Mask,
    bounding_box,
    largest_component,
    meaningful_components,
    separate_components,
)
from semisam_core.plan_sections.pseudo_labels import Gates, Prompting
from semisam_core.prompting.depth import BorderDistances
from semisam_core.scratch import Scratch

# At most this many parts of a region are prompted separately, on a slice or in the volume, largest first. Each costs a
# decoder pass, in every plane and for every margin, and a specialist that sees more pieces than this is usually too
# immature for the small ones to be worth it.
MAXIMUM_PARTS = 8


class Refusal(StrEnum):
    """Why a scan got no pseudo-label for a class. No other words may be reported."""

    EMPTY = "empty"
    TOO_SMALL = "too-small"
    TOO_LARGE = "too-large"
    IMPLAUSIBLE = "implausible-volume"
    LOW_QUALITY = "low-quality"
    LOW_CONFIDENCE = "low-confidence"
    DISAGREEMENT = "disagreement"
    FAILED = "failed"
    UNCORROBORATED = "uncorroborated"


@dataclass(frozen=True)
class Region:
    """The region of one class that prompts the generalists.

    Attributes:
        mask: (H, W, D) bool.
        others: (H, W, D) bool, the foreground of the other classes outside the mask; all False if there is none.
        spacing_mm: voxel size along H, W, D.
        connected: whether the class is a single piece. What a slice shows of it is then prompted as one, however many
            components it has there; otherwise each component is prompted separately.
    """

    mask: Mask
    others: Mask
    spacing_mm: tuple[float, float, float]
    connected: bool = False

    def grown(self, margin_mm: float) -> Region:
        """Return the region with its surface moved outwards by a margin, or inwards if the margin is negative.

        A negative margin always leaves the core that lies deeper than half the greatest depth, so that something is
        left to prompt with.
        """
        if margin_mm == 0:
            return self
        reach = max(margin_mm, 0.0)
        box = bounding_box(self.mask, [1 + int(reach / side) for side in self.spacing_mm])
        inside, moved = self.mask[box], np.zeros_like(self.mask)
        distances = BorderDistances(inside if margin_mm < 0 else ~inside, self.spacing_mm)
        core = 0.0 if margin_mm > 0 else min(-margin_mm, max(float(each.max()) for _, each in distances) / 2)
        for rows, each in distances:
            moved[box][rows] = each <= margin_mm if margin_mm > 0 else each > core
        return replace(self, mask=moved, others=self.others > moved)

    def parts(self) -> Iterator[Region]:
        """Yield the region's components in 3D, each as a region of its own; a connected region is its only part."""
        if self.connected:
            yield self
            return
        for part in separate_components(self.mask, 0.0, MAXIMUM_PARTS):
            yield replace(self, mask=part)


def find_region(
    probability: Tensor,
    spacing_mm: Sequence[float],
    prompting: Prompting,
    gates: Gates,
    others: Tensor | None = None,
    connected: bool = False,
    scratch: Scratch | None = None,
) -> Region | Refusal:
    """Threshold the foreground probability of a class and keep its meaningful components.

    Args:
        probability: foreground probability of one class (H, W, D), in [0, 1].
        spacing_mm: voxel size along H, W, D.
        prompting: threshold, and how small a component may be beside the largest.
        gates: the volume that a region must have.
        others: (H, W, D) bool, where the specialist sees other classes.
        connected: whether the class is a single piece; then only its largest component is kept.
        scratch: where the probability is, if not in memory.
    """
    mask: Mask = (scratch or Scratch()).above(probability, prompting.threshold).numpy()
    if not mask.any():
        return Refusal.EMPTY
    kept = largest_component(mask) if connected else meaningful_components(mask, prompting.component_share)
    if refusal := volume_refusal(float(kept.sum()), spacing_mm, gates):
        return refusal
    foreign = np.zeros_like(kept) if others is None else others.numpy() > kept
    height, width, depth = spacing_mm
    return Region(kept, foreign, (float(height), float(width), float(depth)), connected)


def volume_refusal(voxels: float, spacing_mm: Sequence[float], gates: Gates) -> Refusal | None:
    """Return why a volume of this many voxels is refused, or None."""
    millilitres = voxels * float(np.prod(spacing_mm)) / 1000
    if millilitres < gates.minimum_volume_ml:
        return Refusal.TOO_SMALL
    return Refusal.TOO_LARGE if millilitres > gates.maximum_volume_ml else None
