"""What a site reports of a round: counts, losses and mean scores that may leave, and what is booked here only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from semisam_core.evaluation import ClassScore, summarise
from semisam_core.files import append_json_line
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.training import TrainingResult

Scalars = dict[str, float | int]


@dataclass(frozen=True)
class SiteReport:
    """Scalars that may leave, and the weights to send (train only)."""

    scalars: Scalars
    weights: dict[str, Tensor] | None = None


def training_scalars(
    counts: Mapping[str, float | int], labels: Mapping[str, PseudoLabel], result: TrainingResult, seconds: float
) -> Scalars:
    """Return the scalars of a training round.

    Args:
        counts: of the site's scans.
        labels: the pseudo-labels of the round, by case.
        result: steps taken and mean losses.
        seconds: what the round took.
    """
    confidences = [confidence for label in labels.values() for confidence in label.confidences()]
    scalars: Scalars = {name: counts[name] for name in ("labeled", "unlabeled")}
    scalars |= count_gates(label.refusals for label in labels.values())
    scalars |= {
        "confidence": fmean(confidences) if confidences else 0.0,
        "steps": result.steps,
        "seconds": seconds,
    }
    for term in ("supervised", "consistency", "generalist"):
        if (value := getattr(result, term)) is not None:
            scalars[f"loss.{term}"] = value
    return scalars


def count_gates(scans: Iterable[Sequence[Refusal | None]]) -> Scalars:
    """Count accepted and refused (scan, class) pairs, the latter by reason."""
    refusals = [refusal for scan in scans for refusal in scan]
    counts: Scalars = {
        "accepted": sum(refusal is None for refusal in refusals),
        "gated": sum(refusal is not None for refusal in refusals),
    }
    for refusal in refusals:
        if refusal is not None:
            counts[f"gated.{refusal.value}"] = counts.get(f"gated.{refusal.value}", 0) + 1
    return counts


def mean_scores(scores: Sequence[Sequence[ClassScore | None]], names: Sequence[str], allowed: Sequence[str]) -> Scalars:
    """Return means over cases.

    Args:
        scores: case by case, one score a class or None.
        names: of the classes.
        allowed: the scores that may leave this site.
    """
    scalars: Scalars = {}
    for k, name in enumerate(names):
        summary = summarise(case[k] for case in scores)
        if summary is None:
            continue
        for score in allowed:
            if (value := getattr(summary, score)) is not None:
                scalars[f"{score}.{name}"] = value
    return scalars


def book_gates(path: Path, round_number: int, labels: Mapping[str, PseudoLabel], names: Sequence[str]) -> None:
    """Append how many scans were accepted and refused for each class; stays at the site."""
    for k, name in enumerate(names if labels else ()):
        counts = count_gates(label.refusals[k : k + 1] for label in labels.values())
        append_json_line(path, {"round": round_number, "class": name, **counts})


def book_scores(
    path: Path, round_number: int, case: str, scores: Sequence[ClassScore | None], names: Mapping[int, str]
) -> None:
    """Append one case's scores of the classes in `names` (class from 1 -> its name); stays at the site."""
    for k, name in names.items():
        score = scores[k - 1]
        append_json_line(path, {"round": round_number, "case": case, "class": name} | (vars(score) if score else {}))
