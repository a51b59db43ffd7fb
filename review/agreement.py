"""How far two raters agree: Cohen's kappa of their ratings, Dice of their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.reviews import Rating, ReviewRecord
from semisam_core.evaluation import dice_of

GRADES = tuple(int(each) for each in Rating)


@dataclass(frozen=True)
class ClassAgreement:
    """How far two raters agree on one class.

    Attributes:
        name: the class.
        scans: pseudo-labels that both rated.
        kappa: Cohen's kappa; None if both gave every scan one and the same rating, which chance explains as well.
        weighted_kappa: with squared distances between ratings as weights, so that 1 against 4 counts more than 1
            against 2; None as above.
        dice: the mean Dice of the masks, over the scans of which both left one; None if there is none.
        masks: how many these are.
    """

    name: str
    scans: int
    kappa: float | None
    weighted_kappa: float | None
    dice: float | None
    masks: int

    def as_json(self) -> dict[str, Any]:
        """Return it for a file."""
        return asdict(self)


def cohens_kappa(first: Sequence[int], second: Sequence[int], weighted: bool = False) -> float | None:
    """Return Cohen's kappa of two raters' ratings (1 to 4) of the same things.

    kappa = 1 - sum(w * observed) / sum(w * expected by chance), w being 1 for different ratings and 0 for equal ones
    (Cohen, Educational and Psychological Measurement 1960), or the squared distance (Cohen, Psychological Bulletin
    1968).

    Args:
        first: one rater's.
        second: the other's, in the same order.
        weighted: by squared distance.

    Returns:
        The kappa; None if chance would never make them differ, or there are no ratings.

    Raises:
        ValueError: the numbers of ratings differ.
    """
    if not first:
        return None
    counts = np.zeros((len(GRADES), len(GRADES)))
    for one, other in zip(first, second, strict=True):
        counts[one - 1, other - 1] += 1
    distance = np.subtract.outer(np.arange(len(GRADES)), np.arange(len(GRADES)))
    weights = (distance**2 if weighted else distance != 0).astype(float)
    chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    expected = float((weights * chance).sum())
    return None if expected == 0 else 1 - float((weights * counts).sum()) / expected


def agreement(
    records: Iterable[ReviewRecord],
    raters: tuple[str, str],
    classes: Sequence[str],
    mask: Callable[[ReviewRecord], NDArray[np.uint8]],
) -> list[ClassAgreement]:
    """Return how far two raters agree on each class, by their last words on the same pseudo-labels.

    Args:
        records: oldest first.
        raters: their names.
        classes: the plan's.
        mask: returns the mask of class indices that a record left.
    """
    words: dict[str, dict[tuple[str, str], ReviewRecord]] = {rater: {} for rater in raters}
    for record in records:
        if record.rater in words and list(record.classes) == list(classes):
            words[record.rater][record.case, record.pseudo_label] = record
    first, second = (words[rater] for rater in raters)
    pairs = [(first[key], second[key]) for key in sorted(first.keys() & second.keys())]
    drawn = [pair for pair in pairs if pair[0].label is not None and pair[1].label is not None]
    overlaps: list[list[float]] = [[] for _ in classes]
    for one, other in drawn:
        masks = torch.from_numpy(mask(one)), torch.from_numpy(mask(other))
        for k, found in enumerate(overlaps, start=1):
            found.append(dice_of(masks[0] == k, masks[1] == k))
    result = []
    for k, name in enumerate(classes):
        ratings = [each.ratings[name] for each, _ in pairs], [each.ratings[name] for _, each in pairs]
        result.append(
            ClassAgreement(
                name=name,
                scans=len(pairs),
                kappa=cohens_kappa(*ratings),
                weighted_kappa=cohens_kappa(*ratings, weighted=True),
                dice=sum(overlaps[k]) / len(overlaps[k]) if overlaps[k] else None,
                masks=len(drawn),
            )
        )
    return result
