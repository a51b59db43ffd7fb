"""A site's report on a round: scalars that may leave, and the per-case and per-class lines that stay here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from torch import Tensor

from semisam_core.contract import CLASS_SCORES
from semisam_core.evaluation import ClassScore, summarise
from semisam_core.files import append_json_line
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.store import StoredPseudoLabel
from semisam_core.training import TrainingResult

Scalars = dict[str, float | int]


@dataclass(frozen=True)
class SiteReport:
    """The scalars to send, about how many patients each of the sensitive ones is, and the weights (train only)."""

    scalars: Scalars
    weights: dict[str, Tensor] | None = None
    patients: Mapping[str, int] = field(default_factory=dict)


def training_scalars(
    counts: Mapping[str, float | int], labels: Mapping[str, StoredPseudoLabel], result: TrainingResult, seconds: float
) -> Scalars:
    """Return the scalars of a training round.

    Args:
        counts: the site's scans by role.
        labels: the round's pseudo-labels by case.
        result: steps taken, mean losses and gradients.
        seconds: duration of the round.
    """
    confidences = [confidence for label in labels.values() for confidence in label.confidences]
    scalars: Scalars = {name: counts[name] for name in ("labeled", "unlabeled")}
    scalars |= count_gates(label.refusals for label in labels.values())
    scalars |= {
        "confidence": fmean(confidences) if confidences else 0.0,
        "steps": result.steps,
        "seconds": seconds,
    }
    scalars |= {f"loss.{term}": value for term, value in result.losses.items()}
    scalars |= {f"gradient.{term}": value for term, value in result.gradients.items()}
    return scalars


def training_patients(scalars: Iterable[str], labeled: int, trained: int, pseudo_labeled: int) -> dict[str, int]:
    """Return about how many patients each mean of a training round is.

    Args:
        scalars: the names of the round's scalars.
        labeled: patients with labels.
        trained: patients with scans for training.
        pseudo_labeled: patients with an accepted pseudo-label.
    """
    of_term = {"supervised": labeled, "consistency": trained, "generalist": pseudo_labeled}
    found = {name: of_term[term] for name in scalars if (term := name.partition(".")[2]) in of_term}
    return found | {"confidence": pseudo_labeled}


def score_patients(
    scores: Sequence[Sequence[ClassScore | None]], patients: Sequence[str], names: Sequence[str]
) -> dict[str, int]:
    """Return over how many patients each mean score of each class is.

    Args:
        scores: per case, each class's scores, or None where there are none.
        patients: whose each case is.
        names: the class names.
    """
    found = {}
    for k, name in enumerate(names):
        scored = [(case[k], patient) for case, patient in zip(scores, patients, strict=True)]
        for score in CLASS_SCORES:
            found[f"{score}.{name}"] = len(
                {patient for each, patient in scored if each is not None and getattr(each, score, 0) is not None}
            )
    return found


def count_gates(scans: Iterable[Sequence[Refusal | None]]) -> Scalars:
    """Count accepted and gated (scan, class) pairs, the latter also by the gate's reason.

    Args:
        scans: per scan, each class's refusal, or None where its pseudo-label was accepted.
    """
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
    """Return the mean over cases of every allowed score, per class.

    Args:
        scores: per case, each class's scores, or None where there are none.
        names: the class names.
        allowed: names of the scores that may leave this site.
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


def log_gates(path: Path, round_number: int, labels: Mapping[str, StoredPseudoLabel], names: Sequence[str]) -> None:
    """Append, per class, how many scans' pseudo-labels were accepted and gated. The file stays at the site."""
    for k, name in enumerate(names if labels else ()):
        counts = count_gates(label.refusals[k : k + 1] for label in labels.values())
        append_json_line(path, {"round": round_number, "class": name, **counts})


def log_scores(
    path: Path, round_number: int, case: str, scores: Sequence[ClassScore | None], names: Mapping[int, str]
) -> None:
    """Append one case's scores of the classes in `names` (index from 1 -> name). The file stays at the site."""
    for k, name in names.items():
        score = scores[k - 1]
        append_json_line(path, {"round": round_number, "case": case, "class": name} | (vars(score) if score else {}))
