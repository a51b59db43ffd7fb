"""Scores on scans that the runs of a comparison used as unlabeled, where this machine has labels for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from client.site_config import load_site_config
from engines.run_state import run_name
from experiments.comparison.arms import Arm, Who
from experiments.comparison.jobs import Job
from experiments.comparison.scores import by_case
from semisam_core.files import write_json
from semisam_core.plan import load_plan
from semisam_core.reporting.bootstrap import CaseKey, Estimate, estimate, paired_difference

FILE = "unlabeled.json"


@dataclass(frozen=True)
class HiddenScore:
    """Dice of one class of one scan that a run used without its label.

    Attributes:
        prompting: of the specialist that prompted the last pseudo-label.
        pseudo_label: of that pseudo-label; None if there is none or it was refused.
        final: of the last round's specialist.
    """

    site: str
    case: str
    target: str
    seed: int
    prompting: float | None
    pseudo_label: float | None
    final: float

    @property
    def key(self) -> CaseKey:
        """The scan, unique over all sites."""
        return (self.site, self.case)


def unlabeled_scores(
    job: Job, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[HiddenScore, ...]:
    """Return a completed run's scores; the first call computes them and keeps them in the run's folder.

    An arm that trains alone has no scans in common with sites without labels, and the pooled site has no labels of
    unlabeled scans, so only federated arms are scored.

    Args:
        job: a completed run.
        progress: called with (scans scored, scans).
    """
    if not isinstance(job.arm, Arm) or job.arm.who is not Who.FEDERATED:
        return ()
    path = job.folder / FILE
    if not path.exists():
        from experiments.unlabeled import score_unlabeled  # imports torch and MONAI, which take seconds

        configs = [load_site_config(each) for each in sorted(job.sites.glob("*.yaml"))]
        found = score_unlabeled(load_plan(job.plan_path), configs, job.folder, run_name(job.folder), progress)
        write_json(path, [asdict(each) for each in found])
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(HiddenScore(**each, seed=job.seed or 0) for each in content)


@dataclass(frozen=True)
class HiddenFigures:
    """One class of one arm on the scans that it used as unlabeled.

    Attributes:
        final: mean Dice of the last round's specialist.
        final_difference: arm minus baseline, paired by scan and seed; None for the baseline.
        pseudo_label: mean Dice of the pseudo-labels that were accepted in the last refresh.
        gain: pseudo-label minus the specialist that prompted it, on the same scans.
    """

    target: str
    final: Estimate
    final_difference: Estimate | None
    pseudo_label: Estimate | None
    gain: Estimate | None


def hidden_figures(
    scores: Sequence[HiddenScore], against: Sequence[HiddenScore], classes: Sequence[str]
) -> tuple[HiddenFigures, ...]:
    """Return the figures of each class that has scores.

    Args:
        scores: of one arm under one label count, over all seeds.
        against: of the baseline under the same label count.
        classes: names of the foreground classes.
    """
    figures = []
    for target in classes:
        measured: Mapping[str, Mapping[CaseKey, Mapping[int, float]]] = {
            measure: by_case(scores, measure, target) for measure in ("prompting", "pseudo_label", "final")
        }
        final = estimate(measured["final"])
        if final is not None:
            figures.append(
                HiddenFigures(
                    target,
                    final,
                    paired_difference(measured["final"], by_case(against, "final", target)),
                    estimate(measured["pseudo_label"]),
                    paired_difference(measured["pseudo_label"], measured["prompting"]),
                )
            )
    return tuple(figures)
