"""Updates that do not fit the others of their round, or contradict their own site's report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from semisam_core.contract import RejectionRule
from semisam_core.plan_sections.aggregation import Admission
from server.admission import Rejected
from server.updates import ShelvedUpdate

COMPARABLE = 3


@dataclass(frozen=True)
class _Part:
    """One network within the updates.

    Attributes:
        words: what it is called in a reason.
        steps: the scalar with a site's steps on it.
        norm: reads the norm of its change.
    """

    words: str
    steps: str
    norm: Callable[[ShelvedUpdate], float]


# Each network is compared with its own kind: a head that one site trained would hide, or make, an outlier.
PARTS = (
    _Part("specialist", "steps", lambda update: update.change_norm),
    _Part("feature head", "head_steps", lambda update: update.head_norm),
)


def outliers(updates: Sequence[ShelvedUpdate], policy: Admission) -> list[Rejected]:
    """Return the updates to reject, in the order of site names.

    An update without any change although its site reports steps only dilutes the average; one with a change although
    its site reports no steps was not trained. Both are rejected. A site that reports no steps and changed nothing is
    fine: it has no weight. A small change is never a reason: an unlabeled site may change much less than the others.
    The specialist and the feature head are judged separately.

    Args:
        updates: all admitted updates.
        policy: `norm_factor`: the largest accepted multiple of the median norm of changes. The median is taken over
            sites that learned from labels or pseudo-labels: consistency alone moves weights much less. With fewer than
            three of them, only the other sites are compared with it; if there are none, all sites with each other.
    """
    rejected: dict[str, Rejected] = {}
    for part in PARTS:
        for found in (*_contradictions(updates, part), *_too_large(updates, part, policy)):
            rejected.setdefault(found.site, found)
    return [rejected[site] for site in sorted(rejected)]


def _contradictions(updates: Sequence[ShelvedUpdate], part: _Part) -> Iterator[Rejected]:
    for update in updates:
        steps, changed = update.scalars.get(part.steps, 0.0), part.norm(update) > 0
        if changed != (steps > 0):
            reason = (
                f"the site reports {steps:g} steps of the {part.words}, "
                f"but its tensors {'changed' if changed else 'did not change'}"
            )
            yield Rejected(update.site, reason, RejectionRule.STEPS)


def _too_large(updates: Sequence[ShelvedUpdate], part: _Part, policy: Admission) -> Iterator[Rejected]:
    trained = [update for update in updates if update.scalars.get(part.steps, 0.0) > 0 and part.norm(update) > 0]
    taught = [update for update in trained if _taught(update)]
    reference = taught or trained
    judged = (
        trained if len(reference) >= COMPARABLE else [update for update in trained if taught and not _taught(update)]
    )
    if policy.norm_factor is None or not judged:
        return
    middle = median(part.norm(update) for update in reference)
    for update in judged:
        if (times := part.norm(update) / middle) > policy.norm_factor:
            reason = (
                f"the norm of the {part.words}'s change is {times:.1f} times the round's median; "
                f"accepted are at most {policy.norm_factor:g} times"
            )
            yield Rejected(update.site, reason, RejectionRule.CHANGE_TOO_LARGE)


def _taught(update: ShelvedUpdate) -> bool:
    """Return whether the site learned from labels or pseudo-labels."""
    return update.scalars.get("labeled", 0.0) + update.scalars.get("accepted", 0.0) > 0
