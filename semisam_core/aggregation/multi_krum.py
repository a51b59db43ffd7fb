"""Multi-Krum: the weighted mean of all but the updates farthest from the others (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from semisam_core.aggregation.base import AggregationRule, RuleSettings, Update
from semisam_core.aggregation.krum import by_krum, least_updates, malicious_left, tolerates
from semisam_core.aggregation.weighted_mean import combine_by_votes


def _votes(updates: Sequence[Update], shares: Sequence[float], settings: RuleSettings, rejected: int) -> list[float]:
    malicious = malicious_left(settings, rejected)
    kept = set(by_krum(updates, malicious)[: len(updates) - malicious])
    total = math.fsum(shares[k] for k in kept)
    return [share / total if k in kept else 0.0 for k, share in enumerate(shares)]


RULE = AggregationRule("multi-krum", combine_by_votes, _votes, least_updates, tolerates)
