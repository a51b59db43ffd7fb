"""Which unlabeled scans to look at first: those whose label would teach most, judged by their pseudo-labels alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from semisam_core.data.scans import Scan
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.store import StoredPseudoLabel

FARTHEST = math.log(4)  # a volume four times or a quarter of the labels' mean could not be less plausible


@dataclass(frozen=True)
class ClassDoubt:
    """What speaks against one class of a pseudo-label.

    Attributes:
        name: the class.
        disagreement: 1 - mean of exp(-U) inside it, from 0 to 1: how far models, prompts and teacher contradict each
            other, or the combination of sources is undecided. 1 for a refused class.
        implausibility: |log(volume / mean volume of the labels)|, as a share of that of a factor of four, at most 1;
            None if no label shows the class.
        volume_ml: its volume.
        refused: the gate that refused it, or None.
    """

    name: str
    disagreement: float
    implausibility: float | None
    volume_ml: float
    refused: str | None

    @property
    def doubt(self) -> float:
        """The mean of what is known, from 0 to 1."""
        known = [self.disagreement] if self.implausibility is None else [self.disagreement, self.implausibility]
        return 1.0 if self.refused is not None else sum(known) / len(known)


@dataclass(frozen=True)
class WorklistEntry:
    """One unlabeled scan.

    Attributes:
        case: its id.
        classes: the doubts about each class.
        round: the round that made its pseudo-label; None if its file does not say.
    """

    case: str
    classes: tuple[ClassDoubt, ...]
    round: int | None

    @property
    def doubt(self) -> float:
        """The mean over classes, from 0 to 1."""
        return sum(each.doubt for each in self.classes) / len(self.classes)


def mean_volumes_ml(scans: Iterable[Callable[[], Scan | None]], plan: Plan) -> list[float | None]:
    """Return each class's mean volume over the labels that show it; None if none does.

    Args:
        scans: loaders of labeled scans on the plan's grid.
        plan: its classes and spacing.
    """
    voxel_ml = math.prod(plan.data.spacing_mm) / 1000
    seen: list[list[int]] = [[] for _ in plan.task.classes]
    for load in scans:
        scan = load()
        if scan is not None and scan.label is not None:
            counts = scan.label.flatten().bincount(minlength=len(seen) + 1)[1:].tolist()
            for of_class, voxels in zip(seen, counts, strict=True):
                of_class += [voxels] if voxels else []
    return [voxel_ml * sum(each) / len(each) if each else None for each in seen]


def ranked(
    labels: Iterable[tuple[str, StoredPseudoLabel]], means_ml: Sequence[float | None], plan: Plan
) -> list[WorklistEntry]:
    """Return the scans with the most doubtful pseudo-label first; of equal ones, in the order of their ids.

    Args:
        labels: (case, pseudo-label).
        means_ml: each class's mean volume over the labels.
        plan: its classes and spacing.
    """
    entries = [WorklistEntry(case, _doubts(label, means_ml, plan), label.round) for case, label in labels]
    return sorted(entries, key=lambda entry: (-round(entry.doubt, 6), entry.case))


def _doubts(label: StoredPseudoLabel, means_ml: Sequence[float | None], plan: Plan) -> tuple[ClassDoubt, ...]:
    voxel_ml, confidences, doubts = math.prod(plan.data.spacing_mm) / 1000, iter(label.confidences), []
    for k, name in enumerate(plan.class_names):
        accepted, refusal = bool(label.valid[k]), label.refusals[k]
        volume = voxel_ml * label.foreground[k]
        doubts.append(
            ClassDoubt(
                name=name,
                disagreement=1 - next(confidences) if accepted else 1.0,
                implausibility=_implausibility(volume, means_ml[k]),
                volume_ml=volume,
                refused=None if refusal is None else refusal.value,
            )
        )
    return tuple(doubts)


def _implausibility(volume_ml: float, mean_ml: float | None) -> float | None:
    if mean_ml is None:
        return None
    return min(1.0, abs(math.log(volume_ml / mean_ml)) / FARTHEST) if volume_ml > 0 else 1.0
