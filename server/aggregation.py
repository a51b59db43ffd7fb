"""From admitted updates to new global weights: evidence weights, then votes and combination under the plan's rule."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from semisam_core.aggregation import Update, aggregation_rule
from semisam_core.aggregation.evidence import evidence
from semisam_core.contract import HEAD_PREFIX
from semisam_core.plan_sections.aggregation import Aggregation

logger = logging.getLogger(__name__)


def evidence_weights(updates: Sequence[Update], policy: Aggregation, progress: float, classes: int = 1) -> list[float]:
    """Return the evidence weight of each update, summing to one.

    Args:
        updates: admitted updates.
        policy: says what counts, see `evidence`. A site that withheld its confidence, because it is of few patients,
            counts with the mean of the others.
        progress: finished share of the study's rounds, in [0, 1].
        classes: the plan's number of foreground classes.

    Raises:
        ValueError: no update has any weight.
    """
    sent = [each.scalars["confidence"] for each in updates if "confidence" in each.scalars]
    usual = {"confidence": sum(sent) / len(sent) if sent else 1.0}
    raw = [evidence({**usual, **update.scalars}, policy, progress, classes) for update in updates]
    total = sum(raw)
    if total <= 0:
        raise ValueError("no site had anything to learn from in this round")
    return [value / total for value in raw]


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


def combine_heads(
    updates: Sequence[Update], current: Mapping[str, Tensor], policy: Aggregation, rejected: int = 0
) -> dict[str, Tensor]:
    """Return the new feature head's tensors, combined by the plan's rule from the sites that trained it.

    A site's weight is its number of labeled scans; all others send back the head that they were sent. Where fewer sites
    trained it than the rule needs, the head stays as it is.

    Args:
        updates: admitted updates in the order of site names.
        current: the global tensors at the start of the round.
        policy: the rule and its settings.
        rejected: how many sites' replies the server rejected in this round.
    """
    names = [name for name in current if name.startswith(HEAD_PREFIX)]
    if not names:
        return {}
    trained = [_Part(each, names) for each in updates if each.scalars.get("head_steps", 0) > 0]
    total = sum(each.scalars["labeled"] for each in trained)
    if total <= 0:
        return {name: current[name] for name in names}
    try:
        counted = votes(trained, [each.scalars["labeled"] / total for each in trained], policy, rejected)
    except ValueError as error:
        logger.warning("The feature head is left as it is: %s", error)
        return {name: current[name] for name in names}
    return combine(trained, counted, policy)


@dataclass(frozen=True)
class _Part:
    """Some of an update's tensors."""

    update: Update
    names: Sequence[str]

    @property
    def site(self) -> str:
        return self.update.site

    @property
    def scalars(self) -> Mapping[str, float]:
        return self.update.scalars

    def tensor(self, name: str) -> Tensor:
        return self.update.tensor(name)


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
