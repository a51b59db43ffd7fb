"""The interface of a regularizer: what it is built from, what it sees of a training step, what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from semisam_core.plan_sections.training import TrainingSettings
from semisam_core.regularizers.auxiliary_networks import AuxiliaryNetworks


@dataclass(frozen=True)
class RegularizerContext:
    """What a regularizer may depend on when it is built.

    Attributes:
        seed: the plan's; auxiliary networks are initialised from it.
        channels: number of image channels.
        classes: number of foreground classes.
        training: optimizer and schedule, for an auxiliary network trained like the student.
        new_specialist: returns a newly initialised network of the student's architecture for a seed.
        device: where to compute.
    """

    seed: int
    channels: int
    classes: int
    training: TrainingSettings
    new_specialist: Callable[[int], nn.Module]
    device: torch.device


@dataclass(frozen=True)
class UnlabeledPatches:
    """The step's unlabeled batch and its pseudo-labels.

    Attributes:
        image: (B, C, H, W, D).
        target: pseudo-label y (B, K, H, W, D) in [0, 1].
        uncertainty: U, same shape.
        valid: whether the pseudo-label of this class was accepted, (B, K) bool.
    """

    image: Tensor
    target: Tensor
    uncertainty: Tensor
    valid: Tensor


@dataclass(frozen=True)
class LabeledPatches:
    """The step's labeled batch and the student's prediction.

    Attributes:
        image: (B, C, H, W, D).
        label: class indices (B, H, W, D).
        logits: the student's, (B, 1 + K, H, W, D), attached to its graph.
        annotated: the classes (from 1) that this site annotates; None for all.
    """

    image: Tensor
    label: Tensor
    logits: Tensor
    annotated: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TrainingStep:
    """Step t of T at a site with unlabeled scans. Every tensor is on the training device.

    Attributes:
        t: optimizer steps taken so far in the study.
        total_steps: T.
        student: the specialist.
        teacher: its exponential moving average; takes no gradient.
        labeled: None where the site has no labeled scans.
        unlabeled: patches and their pseudo-labels.
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
        """The student's logits for the unlabeled patches, (B, 1 + K, H, W, D), computed on first use."""
        logits: Tensor = self.student(self.unlabeled.image)
        return logits


@dataclass(frozen=True)
class RegularizerLosses:
    """The losses of one step.

    Attributes:
        student: L_unsup, unweighted; its gradient reaches only the student. None where the term does not apply.
        auxiliary: loss of the auxiliary networks; its gradient reaches only them. None for no update.
    """

    student: Tensor | None
    auxiliary: Tensor | None = None


class Regularizer(Protocol):
    """L_unsup, with its auxiliary networks if it has any. One object serves one round."""

    @property
    def auxiliary(self) -> AuxiliaryNetworks | None:
        """Networks trained beside the student, which stay at the site; None if there are none."""

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the losses of student and auxiliary networks. Changes no weights."""
