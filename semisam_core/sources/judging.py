"""How far to trust each source, judged by registered labels on scans without labels.

A registered label has learned nothing, so it cannot favour what a source has memorised, and every unlabeled scan of a
site with labels has one. It is not the truth: a source that is better than it agrees with it no more than it agrees
with the truth. But it tells good sources from bad ones, even where a site has a single label, on which specialist and
feature head were trained and look better than they are. Sites without labels have no judge; with the feature head they
are sent the mean of what the others found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from semisam_core.evaluation import dice_of
from semisam_core.sources.base import Evidence, SourceName

NAMES = tuple(SourceName)


def judged_reliability(records: Iterable[Mapping[str, Evidence]], classes: int) -> Tensor:
    """Return each source's mean Dice with the registered label, (sources, K) in the order of `NAMES`.

    Registration itself is as reliable as the source that agrees with it best. A source that finds nothing of a class
    has Dice 0. NaN for a source that was never asked, and for all where no registered label shows the class.

    Args:
        records: source -> evidence about one unlabeled scan.
        classes: K.
    """
    rows = [_scores(evidence, classes) for evidence in records if SourceName.REGISTRATION in evidence]
    if not rows:
        return torch.full((len(NAMES), classes), torch.nan)
    mean = torch.stack(rows).nanmean(0)
    judge = NAMES.index(SourceName.REGISTRATION)
    others = torch.cat([mean[:judge], mean[judge + 1 :]])
    mean[judge] = torch.where(others.isnan().all(0), torch.nan, others.nan_to_num(0).amax(0))
    return mean


def as_reliability(judged: Tensor) -> dict[str, Tensor]:
    """Return source -> (K,) in [0, 1] from judged values (sources, K); empty while nothing was judged: all are zero.

    Values come from other sites, which may send anything that is finite.
    """
    return dict(zip(NAMES, judged.clamp(0, 1), strict=True)) if bool((judged > 0).any()) else {}


def _scores(evidence: Mapping[str, Evidence], classes: int) -> Tensor:
    judge = evidence[SourceName.REGISTRATION]
    scores = torch.full((len(NAMES), classes), torch.nan)
    for number, name in enumerate(NAMES):
        for k in range(classes):
            if name in evidence and bool(judge.answered[k]):
                scores[number, k] = dice_of(evidence[name].foreground[k] > 0.5, judge.foreground[k] > 0.5)
    return scores
