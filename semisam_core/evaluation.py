"""Scores of a prediction against an expert's label, per class and case, distances in millimetres."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from torch import Tensor


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class in one case. Distances are None, not zero, where prediction or label is empty."""

    dice: float
    jaccard: float
    hd95_mm: float | None
    asd_mm: float | None
    surface_dice: float | None


@dataclass(frozen=True)
class Summary:
    """Mean scores of one class over cases; distances are averaged over the cases that have one.

    Attributes:
        cases: number of scored cases.
        missing_distances: number of scored cases without distances.
    """

    dice: float
    jaccard: float
    hd95_mm: float | None
    asd_mm: float | None
    surface_dice: float | None
    cases: int
    missing_distances: int


def score_case(
    prediction: Tensor, label: Tensor, classes: int, spacing_mm: Sequence[float], tolerance_mm: float
) -> list[ClassScore | None]:
    """Score one case.

    Args:
        prediction: (X, Y, Z) class indices.
        label: (X, Y, Z) class indices.
        classes: number of foreground classes K.
        spacing_mm: voxel size along each axis.
        tolerance_mm: tolerance of the normalised surface Dice.

    Returns:
        One score per class; None where neither label nor prediction has the class.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
    return [_score_class(prediction == k, label == k, spacing_mm, tolerance_mm) for k in range(1, classes + 1)]


def summarise(scores: Iterable[ClassScore | None]) -> Summary | None:
    """Average the scores of one class over cases; None if no case has the class."""
    present = [score for score in scores if score is not None]
    if not present:
        return None
    return Summary(
        dice=statistics.fmean(s.dice for s in present),
        jaccard=statistics.fmean(s.jaccard for s in present),
        hd95_mm=_mean(s.hd95_mm for s in present),
        asd_mm=_mean(s.asd_mm for s in present),
        surface_dice=_mean(s.surface_dice for s in present),
        cases=len(present),
        missing_distances=sum(s.hd95_mm is None for s in present),
    )


def dice_of(first: Tensor, second: Tensor) -> float:
    """Return the Dice overlap of two masks; 1 if both are empty."""
    total = int(first.count_nonzero()) + int(second.count_nonzero())  # sum() would first make an int64 of each voxel
    return 2 * int((first & second).count_nonzero()) / total if total else 1.0


def _score_class(
    predicted: Tensor, true: Tensor, spacing_mm: Sequence[float], tolerance_mm: float
) -> ClassScore | None:
    if not bool(predicted.any()) and not bool(true.any()):
        return None
    dice = dice_of(predicted, true)
    jaccard = dice / (2 - dice)
    if not bool(predicted.any()) or not bool(true.any()):
        return ClassScore(dice, jaccard, None, None, 0.0)
    box = _bounding_box(predicted | true)
    pair = [mask[box][None, None].float() for mask in (predicted, true)]
    spacing = list(spacing_mm)
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    asd = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
    nsd = compute_surface_dice(*pair, [tolerance_mm], include_background=True, spacing=spacing)
    return ClassScore(dice, jaccard, float(hd95), float(asd), float(nsd))


def _bounding_box(mask: Tensor) -> tuple[slice, ...]:
    where = mask.nonzero()
    low, high = where.min(0).values, where.max(0).values
    return tuple(slice(max(0, int(a) - 1), int(b) + 2) for a, b in zip(low, high, strict=True))


def _mean(values: Iterable[float | None]) -> float | None:
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    return float(known.mean()) if len(known) else None
