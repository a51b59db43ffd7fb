"""The geometric median of all updates (RFA; Pillutla et al., IEEE TSP 2022), which a minority of sites cannot steer."""

import math
from collections.abc import Sequence

from torch import Tensor

from semisam_core.aggregation import AggregationRule, RuleSettings, Update, register_rule
from semisam_core.aggregation.base import equal_votes
from semisam_core.aggregation.weighted_mean import weighted_mean


def geometric_median(updates: Sequence[Update], votes: Sequence[float], settings: RuleSettings) -> dict[str, Tensor]:
    """Return the point whose summed distance to all updates is smallest, by Weiszfeld's algorithm."""
    weights = list(votes)
    for _ in range(30):
        middle = weighted_mean(updates, weights)
        closeness = [vote / max(_distance(each, middle), 1e-9) for each, vote in zip(updates, votes, strict=True)]
        weights = [each / math.fsum(closeness) for each in closeness]
    return weighted_mean(updates, weights)


def _distance(update: Update, middle: dict[str, Tensor]) -> float:
    return math.hypot(*(float((update.tensor(name).double() - value).norm()) for name, value in middle.items()))


RULE = AggregationRule(
    name="geometric-median",
    combine=geometric_median,
    votes=equal_votes,
    least_updates=lambda settings: 3,
    tolerates=lambda settings, sites: (sites - 1) // 2,
)


def register() -> None:
    """Let plans say `aggregation: {rule: geometric-median}`."""
    register_rule(RULE)
