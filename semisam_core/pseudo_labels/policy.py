"""What the plan says about pseudo-labels, read for the modules of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.prompting import Refusal, Region, find_region


def policy_of(plan: Plan) -> PseudoLabels:
    """Return the plan's pseudo-label section.

    Raises:
        ValueError: the plan has none.
    """
    if plan.pseudo_labels is None:
        raise ValueError("the plan has no pseudo_labels section")
    return plan.pseudo_labels


def region_of_class(teacher: Tensor, k: int, plan: Plan) -> Region | Refusal:
    """Return the region of one class that prompts the generalists, or why there is none.

    Args:
        teacher: the teacher's probabilities (1 + K, H, W, D), background first.
        k: the class, from 1.
        plan: thresholds and gates, and which classes are connected; must have `pseudo_labels`.
    """
    policy = policy_of(plan)
    others = (torch.cat([teacher[1:k], teacher[k + 1 :]]) > policy.prompting.threshold).any(0)
    connected = plan.task.classes[k - 1].connected
    return find_region(teacher[k], plan.data.spacing_mm, policy.prompting, policy.gates, others, connected)
