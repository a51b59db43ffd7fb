"""Figures of a comparison: each arm's means with intervals, differences from the baseline, sites worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.comparison.arms import Standing
from experiments.comparison.jobs import Job
from experiments.comparison.scores import CaseScore, RunScores, by_case, missing_distances
from experiments.comparison.unlabeled import HiddenFigures, HiddenScore, hidden_figures
from semisam_core.reporting.bootstrap import Estimate, estimate, paired_difference


@dataclass(frozen=True)
class Figures:
    """Scores of one class over a set of cases. Distances are means over the scores that have one.

    Attributes:
        dice: mean Dice.
        hd95_mm: mean 95th percentile of the surface distance, None if no score has one.
        missing_distances: number of scores without a distance because prediction or label is empty.
    """

    dice: Estimate
    hd95_mm: Estimate | None
    missing_distances: int


@dataclass(frozen=True)
class ClassResult:
    """One class of one arm.

    Attributes:
        target: the class.
        overall: figures over all cases of all sites.
        dice_difference: arm minus baseline, paired by case and seed; None for the baseline, for oracles, and if the two
            have no case and seed in common.
        hd95_difference_mm: likewise, over pairs in which both have a distance.
        sites: (site, figures), lowest Dice first.
    """

    target: str
    overall: Figures
    dice_difference: Estimate | None
    hd95_difference_mm: Estimate | None
    sites: tuple[tuple[str, Figures], ...]


@dataclass(frozen=True)
class ArmResult:
    """One arm under one label count.

    Attributes:
        arm: its name.
        standing: result, reference or oracle.
        labeled: the label count, None for an oracle.
        training_labels: site -> the cases whose labels it trained on.
        selected_by: how the published specialists were selected.
        unfinished: titles of its runs without scores.
        classes: one entry per class that was scored.
        unlabeled: likewise on the scans that it used as unlabeled, where there are labels for them.
    """

    arm: str
    standing: Standing
    labeled: str | None
    training_labels: Mapping[str, tuple[str, ...]]
    selected_by: str
    unfinished: tuple[str, ...]
    classes: tuple[ClassResult, ...]
    unlabeled: tuple[HiddenFigures, ...] = ()

    @property
    def label_total(self) -> int:
        """Number of labeled training scans over all sites."""
        return sum(len(cases) for cases in self.training_labels.values())


def gather(
    jobs: Sequence[Job],
    finished: Mapping[Job, RunScores],
    classes: Sequence[str],
    baseline: str,
    hidden: Mapping[Job, Sequence[HiddenScore]] | None = None,
) -> list[ArmResult]:
    """Return the figures of every arm under every label count, in the order of the jobs, oracles last.

    Args:
        jobs: all runs.
        finished: the scores of the runs that completed.
        classes: names of the foreground classes.
        baseline: the arm to compare with, under the same label count.
        hidden: the scores of completed runs on scans that they used as unlabeled.
    """
    groups: dict[tuple[str | None, str], list[Job]] = {}
    for job in jobs:
        oracle = job.arm.standing is Standing.ORACLE
        groups.setdefault((None if oracle else job.cohort.setting, job.arm.name), []).append(job)
    pooled_scores = {
        key: [score for job in group if job in finished for score in finished[job].scores]
        for key, group in groups.items()
    }
    unlabeled = {key: [each for job in group for each in (hidden or {}).get(job, ())] for key, group in groups.items()}
    results = []
    for (setting, name), group in groups.items():
        other = None if setting is None or name == baseline else (setting, baseline)
        against = pooled_scores.get(other, []) if other is not None else []
        arm = _arm(group, finished, pooled_scores[setting, name], against, classes)
        compared = unlabeled.get(other, []) if other is not None else []
        results.append(replace(arm, unlabeled=hidden_figures(unlabeled[setting, name], compared, classes)))
    return sorted(results, key=lambda result: result.standing is Standing.ORACLE)


def as_json(results: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """Return the figures as plain values."""
    return [asdict(result) for result in results]


def _arm(
    group: Sequence[Job],
    finished: Mapping[Job, RunScores],
    scores: Sequence[CaseScore],
    against: Sequence[CaseScore],
    classes: Sequence[str],
) -> ArmResult:
    first = group[0]
    oracle = first.arm.standing is Standing.ORACLE
    labels: dict[str, tuple[str, ...]] = {}
    for job in group:
        labels |= job.training_labels
    found = (_class(scores, against, target) for target in classes)
    return ArmResult(
        arm=first.arm.name,
        standing=first.arm.standing,
        labeled=None if oracle else first.cohort.setting,
        training_labels=labels,
        selected_by="; ".join(sorted({finished[job].selected_by for job in group if job in finished})),
        unfinished=tuple(job.title for job in group if job not in finished),
        classes=tuple(each for each in found if each is not None),
    )


def _class(scores: Sequence[CaseScore], against: Sequence[CaseScore], target: str) -> ClassResult | None:
    overall = _figures(scores, target, None)
    if overall is None:
        return None
    sites = {site: _figures(scores, target, site) for site in sorted({score.site for score in scores})}
    ranked = [(site, figures) for site, figures in sites.items() if figures is not None]
    ranked.sort(key=lambda each: each[1].dice.mean)
    differences = {
        measure: paired_difference(by_case(scores, measure, target), by_case(against, measure, target))
        for measure in ("dice", "hd95_mm")
    }
    return ClassResult(target, overall, differences["dice"], differences["hd95_mm"], tuple(ranked))


def _figures(scores: Sequence[CaseScore], target: str, site: str | None) -> Figures | None:
    dice = estimate(by_case(scores, "dice", target, site))
    if dice is None:
        return None
    distance = estimate(by_case(scores, "hd95_mm", target, site))
    return Figures(dice, distance, missing_distances(scores, target, site))
