"""What the plan says about pseudo-labels, read for the modules of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.prompting import Refusal, Region, find_region
from semisam_core.scratch import Scratch


def policy_of(plan: Plan) -> PseudoLabels:
    """Return the plan's pseudo-label section.

    Raises:
        ValueError: the plan has none.
    """
    if plan.pseudo_labels is None:
        raise ValueError("the plan has no pseudo_labels section")
    return plan.pseudo_labels


def claims_of(foreground: Tensor, plan: Plan, scratch: Scratch | None = None) -> Tensor:
    """Return how many classes claim each voxel, (H, W, D) int16 in `scratch`: are above the threshold of prompts.

    Args:
        foreground: probability of each class (K, H, W, D).
        plan: the threshold; must have `pseudo_labels`.
        scratch: where the maps are, if not in memory.
    """
    scratch = scratch or Scratch()
    claims = scratch.zeros(foreground.shape[1:], torch.int16)
    for count, *classes in scratch.blocks(claims, *foreground):
        for probability in classes:
            count += probability > policy_of(plan).prompting.threshold
    return claims


def region_of_class(
    probability: Tensor, k: int, plan: Plan, claims: Tensor, scratch: Scratch | None = None
) -> Region | Refusal:
    """Return the region of one class that prompts the generalists, or why there is none.

    Args:
        probability: of the class (H, W, D).
        k: the class, from 1.
        plan: thresholds and gates, and which classes are connected; must have `pseudo_labels`.
        claims: of all classes, as from `claims_of`.
        scratch: where these maps are, if not in memory.
    """
    policy, scratch = policy_of(plan), scratch or Scratch()
    others = torch.empty(claims.shape, dtype=torch.bool)
    for found, each, count in scratch.blocks(others, probability, claims):
        torch.gt(count, each > policy.prompting.threshold, out=found)
    connected = plan.task.classes[k - 1].connected
    return find_region(probability, plan.data.spacing_mm, policy.prompting, policy.gates, others, connected, scratch)
