"""From the specialist's probability for one class to prompts that a generalist takes, or the reason for none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from semisam_core.generalists.base import PromptKind, Prompts, SliceBox
from semisam_core.plan import Gates, Prompting


class Refusal(StrEnum):
    """Why a scan got no pseudo-label for a class. These words, and no others, may be reported."""

    EMPTY = "empty"
    TOO_SMALL = "too-small"
    TOO_LARGE = "too-large"
    LOW_QUALITY = "low-quality"
    DISAGREEMENT = "disagreement"
    FAILED = "failed"


@dataclass(frozen=True)
class PromptSets:
    """Several prompt sets for one class of one scan; their disagreement is the uncertainty.

    Attributes:
        sets: prompt sets, each covering the same slices.
        region: (H, W, D) bool, the components that were prompted.
    """

    sets: tuple[Prompts, ...]
    region: Tensor


def make_prompts(
    probability: Tensor, spacing_mm: Sequence[float], prompting: Prompting, gates: Gates
) -> PromptSets | Refusal:
    """Turn a class's foreground probability into prompt sets.

    The probability is binarised, its meaningful connected components are kept, and each slice that they touch gets
    boxes: bounds smoothed along the slices by a median, one prompt set for each margin.

    Args:
        probability: foreground probability of one class (H, W, D), in [0, 1].
        spacing_mm: voxel size along H, W, D.
        prompting: threshold, components, margins.
        gates: the volume a region must have.
    """
    if prompting.kind is not PromptKind.BOX_2D:
        raise ValueError(f"prompts of kind {prompting.kind.value} cannot be made; box-2d can")
    mask = (probability > prompting.threshold).numpy()
    if not mask.any():
        return Refusal.EMPTY
    region = meaningful_components(mask, prompting.component_share)
    millilitres = float(region.sum() * np.prod(spacing_mm) / 1000)
    if millilitres < gates.minimum_volume_ml:
        return Refusal.TOO_SMALL
    if millilitres > gates.maximum_volume_ml:
        return Refusal.TOO_LARGE
    slices, bounds = slice_bounds(region)
    bounds = smooth_bounds(slices, bounds, prompting.smooth_slices)
    sets = tuple(
        Prompts(boxes=_with_margin(slices, bounds, margin, spacing_mm, mask.shape)) for margin in prompting.margins_mm
    )
    return PromptSets(sets, torch.from_numpy(region))


def meaningful_components(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Keep the 3D components (26-connected) that have at least `share` of the largest one's voxels."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = (sizes >= share * sizes.max())[labels] & mask
    return kept


def slice_bounds(region: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the slices along the last axis that the region touches (N,), and its inclusive bounds there.

    The bounds are (N, 4): row_min, column_min, row_max, column_max in voxels.
    """
    slices = np.flatnonzero(region.any(axis=(0, 1)))
    bounds = np.empty((len(slices), 4))
    for position, index in enumerate(slices):
        rows = np.flatnonzero(region[:, :, index].any(axis=1))
        columns = np.flatnonzero(region[:, :, index].any(axis=0))
        bounds[position] = rows[0], columns[0], rows[-1], columns[-1]
    return slices, bounds


def smooth_bounds(slices: NDArray[np.int64], bounds: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Median-filter each bound along runs of neighbouring slices, so that one bad slice moves no box."""
    smoothed = bounds.copy()
    runs = np.split(np.arange(len(slices)), np.flatnonzero(np.diff(slices) > 1) + 1)
    for run in runs:
        smoothed[run] = ndimage.median_filter(bounds[run], size=(window, 1), mode="nearest")
    return smoothed


def _with_margin(
    slices: NDArray[np.int64],
    bounds: NDArray[np.float64],
    margin_mm: float,
    spacing_mm: Sequence[float],
    shape: tuple[int, ...],
) -> tuple[SliceBox, ...]:
    rows, columns = margin_mm / spacing_mm[0], margin_mm / spacing_mm[1]
    boxes = []
    for index, (top, left, bottom, right) in zip(slices, bounds, strict=True):
        # A negative margin never shrinks a box beyond half of its size.
        dr, dc = max(rows, -(bottom - top) / 4), max(columns, -(right - left) / 4)
        box = (
            max(0.0, top - dr),
            max(0.0, left - dc),
            min(shape[0] - 1.0, bottom + dr),
            min(shape[1] - 1.0, right + dc),
        )
        boxes.append(SliceBox(int(index), (float(box[0]), float(box[1]), float(box[2]), float(box[3]))))
    return tuple(boxes)
