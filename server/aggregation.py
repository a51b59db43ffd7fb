"""From admitted updates to new global weights. What an update weighs is computed apart from how they are combined.

`evidence_weights` says what each update weighs, `votes` what of that the plan's rule lets count, `combine` combines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from semisam_core.plan_sections.aggregation import Aggregation
from server import robust
from server.updates import Update


def evidence_weights(updates: Sequence[Update], policy: Aggregation, progress: float, classes: int = 1) -> list[float]:
    """Return what each update weighs, summing to one.

    An update of a site that took no step carries nothing new and weighs 0.

    Args:
        updates: admitted updates.
        policy: `samples`: labeled and unlabeled scans; `equal`; `evidence`: labeled scans plus unlabeled_share *
            exp(-5 (1 - progress)^2) * accepted pseudo-labels / classes, of which a scan has one a class; `confidence`:
            likewise, with the sum of their mean confidences in place of their number.
        progress: share of the study's rounds that are done, in [0, 1].
        classes: the plan's number of foreground classes.

    Raises:
        ValueError: no update weighs anything.
    """
    raw = [
        _evidence(update.scalars, policy, progress, classes) if update.scalars["steps"] > 0 else 0.0
        for update in updates
    ]
    total = sum(raw)
    if total <= 0:
        raise ValueError("no site brought anything to learn from in this round")
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
    """Return what each update counts under the plan's rule, summing to one.

    An update that weighs nothing counts nothing under any rule. Of the others, `weighted-mean` takes the shares as they
    are, `median` and `trimmed-mean` take all alike, `krum` takes one, and `multi-krum` the shares of all but as many as
    the plan takes for malicious.

    A site whose answer was rejected is one of those that the rule would have had to bear: it counts towards the number
    of sites that the rule needs, and as one malicious site less among the others. Otherwise one site at the minimum
    could stop a study by sending nonsense.

    Args:
        updates: admitted updates in the order of site names.
        shares: from `evidence_weights`.
        policy: rule, trim_share and malicious_sites.
        rejected: how many sites' answers of this round the server rejected; sites that are silent are none of them.

    Raises:
        ValueError: the rule needs more updates than there are.
    """
    if policy.rule == "weighted-mean":
        return list(shares)
    voters = [k for k, share in enumerate(shares) if share > 0]
    if not voters or len(voters) + rejected < policy.least_updates:
        raise ValueError(
            f"the rule {policy.rule} needs {policy.least_updates} updates, there are {len(voters)} that weigh anything"
            f" and {rejected} that were rejected"
        )
    if policy.rule in ("median", "trimmed-mean"):
        return [1 / len(voters) if share > 0 else 0.0 for share in shares]
    malicious = max(0, policy.malicious_sites - rejected)
    order = [voters[place] for place in robust.by_krum([updates[k] for k in voters], malicious)]
    kept = set(order[:1] if policy.rule == "krum" else order[: len(order) - malicious])
    total = math.fsum(shares[k] for k in kept)
    return [share / total if k in kept else 0.0 for k, share in enumerate(shares)]


def combine(updates: Sequence[Update], counted: Sequence[float], policy: Aggregation) -> dict[str, Tensor]:
    """Return the combined specialist.

    Args:
        updates: admitted updates in the order of site names, at least one that counts.
        counted: from `votes`.
        policy: the rule.

    Raises:
        ValueError: there is no update, or votes do not fit.
    """
    voters = [(update, vote) for update, vote in zip(updates, counted, strict=True) if vote > 0]
    if policy.rule == "median":
        return robust.median([update for update, _ in voters])
    if policy.rule == "trimmed-mean":
        return robust.trimmed_mean([update for update, _ in voters], policy.trim_share)
    return weighted_mean([update for update, _ in voters], [vote for _, vote in voters])


def weighted_mean(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_k w_k theta_k, accumulated in double precision in the order of site names.

    The fixed order makes the result the same however replies arrive. One tensor of one site is read at a time.

    Args:
        updates: admitted updates, at least one, all with the same tensors.
        weights: non-negative, summing to one.

    Raises:
        ValueError: there is no update, or weights do not fit.
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
