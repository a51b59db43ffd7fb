"""The coordinate-wise mean without the largest and smallest values (Yin et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import trim_mean
from torch import Tensor

from semisam_core.aggregation.base import AggregationRule, RuleSettings, Update, equal_votes
from semisam_core.aggregation.coordinates import by_coordinate


def trimmed_mean(updates: Sequence[Update], votes: Sequence[float], settings: RuleSettings) -> dict[str, Tensor]:
    """Return the mean of each coordinate without `trim_share` of the values at each end; votes are ignored."""
    return by_coordinate(updates, lambda block: trim_mean(block, settings.trim_share, axis=0))


def _least_updates(settings: RuleSettings) -> int:
    """Return the fewest updates of which any are trimmed."""
    return next(n for n in range(3, 100_000) if int(settings.trim_share * n) > 0)


RULE = AggregationRule(
    name="trimmed-mean",
    combine=trimmed_mean,
    votes=equal_votes,
    least_updates=_least_updates,
    tolerates=lambda settings, sites: int(settings.trim_share * sites),
)
