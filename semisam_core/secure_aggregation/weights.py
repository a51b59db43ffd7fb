"""Whole weights of a site's part in a secure sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from semisam_core.aggregation.evidence import evidence
from semisam_core.plan import Plan
from semisam_core.plan_sections.aggregation import SecureAggregation

PER_SCAN = 4


@dataclass(frozen=True)
class WholeWeights:
    """What a site's specialist and its feature head count in the sum."""

    specialist: int
    head: int


def whole_weights(scalars: Mapping[str, float], plan: Plan, round_number: int) -> WholeWeights:
    """Return the weights of a site's update, from what it reports.

    A head counts as many scans as its site has labels, if the site trained it, and nothing without a specialist.

    Args:
        scalars: the site's report of the round.
        plan: must ask for secure aggregation.
        round_number: the round.
    """
    settings, training = plan.aggregation.secure, plan.training
    if settings is None:
        raise ValueError("the plan does not ask for secure aggregation")
    progress = training.local_round(round_number) / training.rounds_per_generation
    found = evidence(scalars, plan.aggregation, progress, len(plan.class_names))
    specialist = whole_weight(found, settings)
    trained = scalars.get("head_steps", 0) > 0 and specialist > 0
    return WholeWeights(specialist, whole_weight(scalars["labeled"], settings) if trained else 0)


def whole_weight(scans: float, settings: SecureAggregation) -> int:
    """Return a weight in quarters of a scan, rounded down to 1, 2, 3, 4, 6, 8, 12, ... and limited; 0 for nothing."""
    if scans <= 0:
        return 0
    quarters = max(1, round(min(scans, settings.maximum_weight) * PER_SCAN))
    power = 1 << (quarters.bit_length() - 1)
    bucket = power + power // 2 if 2 * quarters >= 3 * power else power
    return min(bucket, settings.maximum_weight)
