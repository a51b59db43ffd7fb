"""The coordinate-wise median (Yin et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from semisam_core.aggregation.base import AggregationRule, RuleSettings, Update, equal_votes
from semisam_core.aggregation.coordinates import by_coordinate


def median(updates: Sequence[Update], votes: Sequence[float], settings: RuleSettings) -> dict[str, Tensor]:
    """Return the median of each coordinate; votes are ignored."""
    return by_coordinate(updates, lambda block: np.median(block, axis=0))


RULE = AggregationRule(
    name="median",
    combine=median,
    votes=equal_votes,
    least_updates=lambda settings: 3,  # of two, the median is the mean
    tolerates=lambda settings, sites: (sites - 1) // 2,
)
