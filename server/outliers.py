"""Updates that do not fit the others of their round, or contradict their own site's report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from semisam_core.contract import RejectionRule
from semisam_core.plan_sections.aggregation import Admission
from server.admission import Rejected
from server.updates import ShelvedUpdate

COMPARABLE = 3


def outliers(updates: Sequence[ShelvedUpdate], policy: Admission) -> list[Rejected]:
    """Return the updates to reject, in the order of site names.

    An update without any change although its site reports steps only dilutes the average; one with a change although
    its site reports no steps was not trained. Both are rejected. A site that reports no steps and changed nothing is
    fine: it has no weight. A small change is never a reason: an unlabeled site may change much less than the others.

    Args:
        updates: all admitted updates.
        policy: `norm_factor`: the largest accepted multiple of the median norm of changes. The median is taken over
            sites that took steps; with fewer than three of them, norms are not compared.
    """
    rejected = {update.site: found for update in updates if (found := _disagrees(update)) is not None}
    fitting = [update for update in updates if update.site not in rejected and update.scalars["steps"] > 0]
    if policy.norm_factor is not None and len(fitting) >= COMPARABLE:
        middle = median(update.change_norm for update in fitting)
        for update in fitting:
            if update.change_norm > policy.norm_factor * middle:
                times = update.change_norm / middle
                reason = (
                    f"the norm of its change is {times:.1f} times the round's median; "
                    f"accepted are at most {policy.norm_factor:g} times"
                )
                rejected[update.site] = Rejected(update.site, reason, RejectionRule.CHANGE_TOO_LARGE)
    return [rejected[site] for site in sorted(rejected)]


def _disagrees(update: ShelvedUpdate) -> Rejected | None:
    steps, changed = update.scalars["steps"], update.change_norm > 0
    if changed == (steps > 0):
        return None
    reason = f"the site reports {steps:g} steps, but its tensors {'changed' if changed else 'did not change'}"
    return Rejected(update.site, reason, RejectionRule.STEPS)
