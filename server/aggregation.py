"""From admitted updates to new global weights: evidence weights, then votes and combination under the plan's rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from semisam_core.aggregation import Update, aggregation_rule
from semisam_core.plan_sections.aggregation import Aggregation


def evidence_weights(updates: Sequence[Update], policy: Aggregation, progress: float, classes: int = 1) -> list[float]:
    """Return the evidence weight of each update, summing to one.

    An update of a site that took no steps carries nothing new and has weight 0.

    Args:
        updates: admitted updates.
        policy: `samples`: labeled and unlabeled scans; `equal`; `evidence`: labeled scans plus unlabeled_share *
            exp(-5 (1 - progress)^2) * accepted pseudo-labels / classes (a scan has up to one per class); `confidence`:
            the same with the sum of the pseudo-labels' mean confidences instead of their number.
        progress: finished share of the study's rounds, in [0, 1].
        classes: the plan's number of foreground classes.

    Raises:
        ValueError: no update has any weight.
    """
    raw = [
        _evidence(update.scalars, policy, progress, classes) if update.scalars["steps"] > 0 else 0.0
        for update in updates
    ]
    total = sum(raw)
    if total <= 0:
        raise ValueError("no site had anything to learn from in this round")
    return [value / total for value in raw]


def _evidence(scalars: Mapping[str, float], policy: Aggregation, progress: float, classes: int) -> float:
    if policy.weights == "equal":
        return 1.0
    if policy.weights == "samples":
        return float(scalars["labeled"] + scalars["unlabeled"])
    ramp = math.exp(-5 * (1 - progress) ** 2)
    pseudo_labels = scalars["accepted"]
    if policy.weights == "confidence":
        pseudo_labels *= scalars["confidence"]
    return float(scalars["labeled"] + policy.unlabeled_share * ramp * pseudo_labels / classes)


def votes(updates: Sequence[Update], shares: Sequence[float], policy: Aggregation, rejected: int = 0) -> list[float]:
    """Return each update's vote under the plan's rule, summing to one.

    An update without evidence weight has no vote under any rule.

    A site whose reply was rejected is one of the hostile sites that the rule would have had to tolerate, so it counts
    towards the number of updates that the rule needs. Otherwise one site could stop a study at its minimum by sending
    nonsense.

    Args:
        updates: admitted updates in the order of site names.
        shares: from `evidence_weights`.
        policy: the rule and its settings.
        rejected: how many sites' replies the server rejected in this round; silent sites do not count.

    Raises:
        ValueError: the rule needs more updates than there are.
    """
    voters = [k for k, share in enumerate(shares) if share > 0]
    needed = policy.least_updates
    if not voters or len(voters) + rejected < needed:
        raise ValueError(
            f"the rule {policy.rule} needs {needed} updates, there are {len(voters)} with any weight"
            f" and {rejected} that were rejected"
        )
    rule = aggregation_rule(policy.rule)
    counted = rule.votes([updates[k] for k in voters], [shares[k] for k in voters], policy, rejected)
    found = [0.0] * len(updates)
    for k, vote in zip(voters, counted, strict=True):
        found[k] = vote
    return found


def combine(updates: Sequence[Update], counted: Sequence[float], policy: Aggregation) -> dict[str, Tensor]:
    """Return the combined specialist.

    Args:
        updates: admitted updates in the order of site names, at least one with a vote.
        counted: from `votes`.
        policy: the rule and its settings.

    Raises:
        ValueError: there is no update, or the votes do not fit.
    """
    voters = [(update, vote) for update, vote in zip(updates, counted, strict=True) if vote > 0]
    rule = aggregation_rule(policy.rule)
    return rule.combine([update for update, _ in voters], [vote for _, vote in voters], policy)
