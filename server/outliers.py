"""Updates of one round that do not fit the others, or what their own site says of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from semisam_core.contract import RejectionRule
from semisam_core.plan_sections.aggregation import Admission
from server.admission import Rejected
from server.updates import ShelvedUpdate

COMPARABLE = 3


def outliers(updates: Sequence[ShelvedUpdate], policy: Admission) -> list[Rejected]:
    """Return the updates that are to be left out of their round, in the order of site names.

    An update that changed nothing although its site says that it took steps brings nothing but a share of the weight,
    and one that changed although its site says that it took none was not trained; both are left out. Of a site that
    honestly took no step nothing is asked: it weighs nothing. Small changes are never a reason: those of a site
    without labels may be much smaller than the others'.

    Args:
        updates: all that were admitted one by one.
        policy: `norm_factor`: the largest multiple of the median norm of changes. The median is over sites that took
            steps, and at least three are needed for one.
    """
    rejected = {update.site: found for update in updates if (found := _disagrees(update)) is not None}
    fitting = [update for update in updates if update.site not in rejected and update.scalars["steps"] > 0]
    if policy.norm_factor is not None and len(fitting) >= COMPARABLE:
        middle = median(update.change_norm for update in fitting)
        for update in fitting:
            if update.change_norm > policy.norm_factor * middle:
                times = update.change_norm / middle
                reason = f"the change has {times:.1f} times the round's median norm, allowed are {policy.norm_factor:g}"
                rejected[update.site] = Rejected(update.site, reason, RejectionRule.CHANGE_TOO_LARGE)
    return [rejected[site] for site in sorted(rejected)]


def _disagrees(update: ShelvedUpdate) -> Rejected | None:
    steps, changed = update.scalars["steps"], update.change_norm > 0
    if changed == (steps > 0):
        return None
    reason = f"the site says that it took {steps:g} steps, and its tensors {'did' if changed else 'did not'} change"
    return Rejected(update.site, reason, RejectionRule.STEPS)
