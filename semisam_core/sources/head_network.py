"""The feature head's network, and how a plan describes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from semisam_core.generalists.registry import generalist_spec
from semisam_core.plan import Plan

POSITIONS = 3  # channels that say where in the scan a feature lies


class PlaneHead(nn.Module):
    """Tells classes apart by features and their place: a 1x1 convolution that reduces channels, then two of 3x3.

    Args:
        features: channels of the generalist's features.
        classes: K.
        reduced: channels that the features are reduced to.
        width: channels between the two 3x3 convolutions.
    """

    def __init__(self, features: int, classes: int, reduced: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(features, reduced, 1)
        self.first = nn.Conv2d(reduced + POSITIONS, width, 3, padding=1)
        self.second = nn.Conv2d(width, 1 + classes, 3, padding=1)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """Return logits (N, 1 + K, S, S) of standardised features (N, C, S, S) at places (N, 3, S, S)."""
        reduced = functional.leaky_relu(self.reduce(features), 0.01)
        hidden = functional.leaky_relu(self.first(torch.cat([reduced, places], 1)), 0.01)
        logits: Tensor = self.second(hidden)
        return logits


class FeatureHead(nn.Module):
    """One `PlaneHead` for each plane in which the plan's generalists cut a scan.

    Args:
        plan: must have `pseudo_labels.sources.feature_head`. Initial weights depend on its seed alone; global random
            state is not touched.

    Raises:
        ValueError: the plan has no feature head.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        policy = plan.pseudo_labels
        if policy is None or policy.sources.feature_head is None:
            raise ValueError("the plan has no pseudo_labels.sources.feature_head")
        settings, classes = policy.sources.feature_head, len(plan.task.classes)
        features = generalist_spec(settings.generalist).card.feature_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.planes = nn.ModuleDict(
                {
                    plane: PlaneHead(features, classes, settings.reduced_channels, settings.hidden_channels)
                    for plane in policy.prompting.planes
                }
            )


def feature_head_of(plan: Plan) -> FeatureHead | None:
    """Return the plan's feature head with its initial weights, or None if the plan has none."""
    policy = plan.pseudo_labels
    uses = policy is not None and policy.method == "evidence" and policy.sources.feature_head is not None
    return FeatureHead(plan) if uses else None
