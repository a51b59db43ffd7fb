"""What a regularizer is built from, what it sees of one training step, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from semisam_core.plan_sections.training import Training
from semisam_core.regularizers.own_networks import OwnNetworks


@dataclass(frozen=True)
class RegularizerContext:
    """What a regularizer may know of the study before the round begins.

    Attributes:
        seed: the study's; a regularizer's own networks start from it.
        channels: of the image.
        classes: of the foreground.
        training: optimizer and schedule, for a network that is trained as the student is.
        new_specialist: seed -> a network of the student's architecture with fresh weights.
        device: where to compute.
    """

    seed: int
    channels: int
    classes: int
    training: Training
    new_specialist: Callable[[int], nn.Module]
    device: torch.device


@dataclass(frozen=True)
class UnlabeledPatches:
    """The step's unlabeled batch and its pseudo-labels.

    Attributes:
        image: (B, C, H, W, D).
        target: pseudo-label y (B, K, H, W, D) in [0, 1].
        uncertainty: U, same shape.
        valid: (B, K) bool, which classes of `target` were accepted.
    """

    image: Tensor
    target: Tensor
    uncertainty: Tensor
    valid: Tensor


@dataclass(frozen=True)
class LabeledPatches:
    """The step's labeled batch and the student's answer to it.

    Attributes:
        image: (B, C, H, W, D).
        label: class indices (B, H, W, D).
        logits: of the student, (B, 1 + K, H, W, D), with their gradient.
        annotated: the classes (from 1) that labels of this site mark; None for all.
    """

    image: Tensor
    label: Tensor
    logits: Tensor
    annotated: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Step:
    """Step t of T at a site that has unlabeled scans. Every tensor is on the device that computes.

    Attributes:
        t: optimizer steps of the study so far.
        total_steps: T.
        student: the specialist.
        teacher: its moving average; takes no gradient.
        labeled: None where the site has no labeled scan.
        unlabeled: patches, with the pseudo-labels that were accepted.
        consistency_weight: lambda_c(t).
        generalist_weight: lambda_s(t); 0 where the plan has no pseudo-labels.
        generator: the only source of randomness, on the CPU.
    """

    t: int
    total_steps: int
    student: nn.Module
    teacher: nn.Module
    labeled: LabeledPatches | None
    unlabeled: UnlabeledPatches
    consistency_weight: float
    generalist_weight: float
    generator: torch.Generator

    @cached_property
    def logits(self) -> Tensor:
        """The student's answer to the unlabeled patches, (B, 1 + K, H, W, D), computed when first asked for."""
        logits: Tensor = self.student(self.unlabeled.image)
        return logits


@dataclass(frozen=True)
class Losses:
    """A regularizer's answer to one step.

    Attributes:
        student: L_unsup, unweighted, whose gradient reaches the student alone; None where it does not apply.
        own: the loss of the regularizer's own networks, whose gradient reaches them alone; None for no update.
    """

    student: Tensor | None
    own: Tensor | None = None


class Regularizer(Protocol):
    """L_unsup, and networks of its own where it needs any. One object lives for one round."""

    @property
    def own(self) -> OwnNetworks | None:
        """The networks that it trains for itself, which stay at the site."""

    def losses(self, step: Step) -> Losses:
        """Return the student's loss and that of the own networks, without moving any weight."""
