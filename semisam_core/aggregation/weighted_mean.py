"""The weighted mean of all updates (FedAvg; McMahan et al., AISTATS 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from semisam_core.aggregation.base import AggregationRule, RuleSettings, Update


def weighted_mean(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_k w_k theta_k, accumulated in double precision in the order of site names.

    The fixed order makes the result independent of the order of arrival. One tensor of one site is read at a time.

    Args:
        updates: admitted updates, at least one, all with the same tensors.
        weights: non-negative, summing to one.

    Raises:
        ValueError: there is no update, or the weights do not fit.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"{len(updates)} updates and {len(weights)} weights cannot be combined")
    if any(w < 0 for w in weights) or not math.isclose(sum(weights), 1.0, rel_tol=1e-9):
        raise ValueError("weights must be non-negative and sum to one")
    ordered = sorted(zip(updates, weights, strict=True), key=lambda pair: pair[0].site)
    result = {}
    for name in ordered[0][0].names:
        first = ordered[0][0].tensor(name)
        total = torch.zeros(first.shape, dtype=torch.float64)
        for update, weight in ordered:
            total += weight * update.tensor(name).double()
        result[name] = total.to(first.dtype) if first.is_floating_point() else total.round().to(first.dtype)
    return result


def combine_by_votes(updates: Sequence[Update], votes: Sequence[float], settings: RuleSettings) -> dict[str, Tensor]:
    """Return the mean of the updates, weighted by their votes."""
    return weighted_mean(updates, votes)


RULE = AggregationRule("weighted-mean", combine_by_votes)
