"""How good pseudo-labels were: for analysis on one machine, where scans that a study uses as unlabeled have labels.

Nothing of a study depends on this, and no site can do it: a site's unlabeled scans carry no path to a label. On each
such scan three things are scored: the global specialist whose prediction prompted the last pseudo-label, that
pseudo-label, and the final specialist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client.site_config import SiteConfig
from semisam_core.contract import split_update
from semisam_core.data.cases import Case, Role, find_cases
from semisam_core.data.scans import Scan, load_scan, prepared_key
from semisam_core.errors import CaseError, ConfigError
from semisam_core.evaluation import dice_of
from semisam_core.inference import new_specialist, predict, segmentation
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.store import PseudoLabelStore


@dataclass(frozen=True)
class UnlabeledScore:
    """Dice of one class of one scan that the study used without its label.

    Attributes:
        site: the site's name.
        case: the scan.
        target: the class's name.
        prompting: of the global specialist at the start of the last round that refreshed pseudo-labels.
        pseudo_label: of that round's pseudo-label; None if it was refused.
        final: of the last round's specialist.
    """

    site: str
    case: str
    target: str
    prompting: float | None
    pseudo_label: float | None
    final: float


def score_unlabeled(
    plan: Plan,
    configs: Sequence[SiteConfig],
    run_folder: Path,
    run: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[UnlabeledScore]:
    """Score what a finished study made of its unlabeled scans; those without a label file are left out.

    Empty where batch-norm layers stay at the sites: the global specialist alone predicts nothing then.

    Args:
        plan: the study plan.
        configs: the site files.
        run_folder: the run's checkpoints.
        run: the run's name, under which sites keep pseudo-labels.
        progress: called with (scans scored, scans).
    """
    if plan.specialist.statistics == "local":
        return []
    final = _specialist(plan, run_folder, plan.training.rounds)
    refreshed = _last_refresh(plan)
    prompting = None if refreshed is None else _specialist(plan, run_folder, refreshed - 1)
    if final is None:
        return []
    cases = [(config, case) for config in configs for case in _hidden(config, plan)]
    scores: list[UnlabeledScore] = []
    for done, (config, case) in enumerate(cases):
        progress(done, len(cases))
        try:
            scan = load_scan(case, plan, config.storage.folder / "prepared", config.storage.memory_gb)
            key = prepared_key(replace(case, label=None, role=Role.UNLABELED), plan)  # as the site sees it
        except CaseError:
            continue  # quarantined at the site too
        scores += _score(plan, config, run, scan, key, prompting, final)
    progress(len(cases), len(cases))
    return scores


@dataclass(frozen=True)
class MeanScores:
    """Means over scans; None where there are none.

    Attributes:
        scans: how many.
        prompting: over scans with a pseudo-label, to compare with it.
        pseudo_label: over the same scans.
        final: over all scans.
    """

    scans: int
    prompting: float | None
    pseudo_label: float | None
    final: float | None


def mean_scores(scores: Sequence[UnlabeledScore]) -> MeanScores:
    """Return the means of one class over scans."""
    accepted = [each for each in scores if each.pseudo_label is not None]
    return MeanScores(
        scans=len(scores),
        prompting=_mean(each.prompting for each in accepted),
        pseudo_label=_mean(each.pseudo_label for each in accepted),
        final=_mean(each.final for each in scores),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _last_refresh(plan: Plan) -> int | None:
    return next((number for number in range(plan.training.rounds, 0, -1) if plan.refreshes(number)), None)


def _specialist(plan: Plan, run_folder: Path, number: int) -> nn.Module | None:
    path = run_folder / "checkpoints" / f"round-{number:05d}.safetensors"
    if not path.exists():
        return None
    specialist = new_specialist(plan)
    weights, _ = split_update(load_file(path))
    specialist.load_state_dict({**specialist.state_dict(), **weights})
    return specialist.eval()


def _hidden(config: SiteConfig, plan: Plan) -> Iterator[Case]:
    """Yield the site's unlabeled cases that have a label file, with it."""
    data = config.data
    if data.labels is None or data.labeled == "all":
        return
    try:
        everything = find_cases(data.images, data.labels, len(plan.task.channels), None, data.validation, data.excluded)
    except ConfigError:
        return
    known = set(data.labeled)
    yield from (case for case in everything.of(Role.LABELED) if case.id not in known)


def _score(
    plan: Plan, config: SiteConfig, run: str, scan: Scan, key: str, prompting: nn.Module | None, final: nn.Module
) -> Iterator[UnlabeledScore]:
    if scan.label is None:
        return
    device = config.torch_device()
    store = PseudoLabelStore(config.storage.folder / "runs" / run / "pseudo_labels")
    label = store.load(key)

    def found(network: nn.Module | None) -> Tensor | None:
        if network is None:
            return None
        return segmentation(predict(network.to(device), scan.image, plan, device), plan)

    before, after = found(prompting), found(final)
    for k, name in enumerate(plan.class_names, start=1):
        truth = scan.label == k
        if not bool(truth.any()) or after is None:
            continue
        yield UnlabeledScore(
            site=config.site,
            case=scan.id,
            target=name,
            prompting=None if before is None else dice_of(torch.as_tensor(before == k), truth),
            pseudo_label=None if label is None or not label.valid[k - 1] else dice_of(label.target[k - 1] > 0.5, truth),
            final=dice_of(torch.as_tensor(after == k), truth),
        )
