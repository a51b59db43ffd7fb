"""The feature head's network, and how a plan describes it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from semisam_core.generalists.registry import generalist_spec
from semisam_core.plan import Plan

POSITIONS = 3  # channels that say where in the scan a feature lies
VOLUME = "volume"  # the only view of a 3D generalist


class ViewHead(nn.Module):
    """Tells classes apart by features and their place: a convolution that reduces channels, then two of size 3.

    Args:
        features: channels of the generalist's features.
        classes: K.
        dimensions: 2 for slices, 3 for cubes.
        reduced: channels that the features are reduced to.
        width: channels between the two convolutions of size 3.
    """

    def __init__(self, features: int, classes: int, dimensions: Literal[2, 3], reduced: int, width: int) -> None:
        super().__init__()
        convolution: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.reduce = convolution(features, reduced, 1)
        self.first = convolution(reduced + POSITIONS, width, 3, padding=1)
        self.second = convolution(width, 1 + classes, 3, padding=1)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """Return logits (N, 1 + K, *S) of standardised features (N, C, *S) at places (N, 3, *S)."""
        reduced = functional.leaky_relu(self.reduce(features), 0.01)
        hidden = functional.leaky_relu(self.first(torch.cat([reduced, places], 1)), 0.01)
        logits: Tensor = self.second(hidden)
        return logits


class FeatureHead(nn.Module):
    """One `ViewHead` for each view of a scan: the plan's planes for a slice-wise generalist, the volume for a 3D one.

    Attributes:
        views: view -> its network.
        log_volumes: (K,) log(1 + v), v the mean volume in ml of each class in the labels that the head was trained on;
            0 before it was trained.

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
        card = generalist_spec(settings.generalist).card
        views = policy.prompting.planes if card.feature_dimensions == 2 else (VOLUME,)
        sizes = settings.reduced_channels, settings.hidden_channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.views = nn.ModuleDict(
                {view: ViewHead(card.feature_channels, classes, card.feature_dimensions, *sizes) for view in views}
            )
        self.log_volumes: Tensor
        self.register_buffer("log_volumes", torch.zeros(classes))


def feature_head_of(plan: Plan) -> FeatureHead | None:
    """Return the plan's feature head with its initial weights, or None if the plan has none."""
    policy = plan.pseudo_labels
    uses = policy is not None and policy.method == "evidence" and policy.sources.feature_head is not None
    return FeatureHead(plan) if uses else None
