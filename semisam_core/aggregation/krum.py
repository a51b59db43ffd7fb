"""Krum: the one update closest to the others (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from semisam_core.aggregation.base import AggregationRule, RuleSettings, Update
from semisam_core.aggregation.coordinates import blocks
from semisam_core.aggregation.weighted_mean import combine_by_votes


def by_krum(updates: Sequence[Update], malicious_sites: int) -> list[int]:
    """Return indices of updates, the most central first.

    An update's score is the sum of squared distances to its n - f - 2 nearest other updates. Equal scores keep the
    order of the updates.

    Raises:
        ValueError: n < 2 f + 3, for which Krum promises nothing.
    """
    count, closest = len(updates), len(updates) - malicious_sites - 2
    if count < 2 * malicious_sites + 3:
        raise ValueError(
            f"Krum with {malicious_sites} malicious sites needs {2 * malicious_sites + 3} updates, there are {count}"
        )
    distances = squared_distances(updates)
    scores = [float(np.sort(np.delete(row, k))[:closest].sum()) for k, row in enumerate(distances)]
    return sorted(range(count), key=lambda k: (scores[k], k))


def squared_distances(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return ||theta_i - theta_j||^2, (n, n), in double precision.

    Computed from differences rather than from norms and products: the distance of two updates is tiny compared with
    their norms and would be lost.
    """
    distances = np.zeros((len(updates), len(updates)))
    for name in updates[0].names:
        for block in blocks(updates, name):
            for k, row in enumerate(block):
                distances[k, k + 1 :] += np.square(block[k + 1 :] - row).sum(1)
    return distances + distances.T


def least_updates(settings: RuleSettings) -> int:
    """Return 2 f + 3, as Krum's proof requires."""
    return 2 * settings.malicious_sites + 3


def tolerates(settings: RuleSettings, sites: int) -> int:
    """Return f."""
    return settings.malicious_sites


def malicious_left(settings: RuleSettings, rejected: int) -> int:
    """Return how many hostile sites may still be among the updates: each rejected site was one of them."""
    return max(0, settings.malicious_sites - rejected)


def _votes(updates: Sequence[Update], shares: Sequence[float], settings: RuleSettings, rejected: int) -> list[float]:
    chosen = by_krum(updates, malicious_left(settings, rejected))[0]
    return [1.0 if k == chosen else 0.0 for k in range(len(updates))]


RULE = AggregationRule("krum", combine_by_votes, _votes, least_updates, tolerates)
