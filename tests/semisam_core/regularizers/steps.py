"""Tiny plans, small training steps and fixed networks for the tests of regularizers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.regularizers import (
    REGULARIZERS,
    LabeledPatches,
    Regularizer,
    RegularizerLosses,
    TrainingStep,
    UnlabeledPatches,
)
from semisam_core.training import new_regularizer
from tests.conftest import tiny_plan

CPU = torch.device("cpu")
NAMES = tuple(REGULARIZERS)
WITH_NETWORKS = ("cps", "dan")
SIDES = (16, 16, 8)


def plan_of(name: str, *changes: str) -> Plan:
    """Return the tiny plan with this regularizer and two unlabeled patches per step."""
    return tiny_plan(f"regularizer.name={name}", "training.unlabeled_batch=2", *changes)


def built(name: str, *changes: str) -> Regularizer:
    regularizer = new_regularizer(plan_of(name, *changes), CPU)
    assert regularizer is not None
    return regularizer


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unlabeled_batch(image: Tensor, classes: int = 1, pseudo_label: bool = False) -> UnlabeledPatches:
    """Return unlabeled patches whose pseudo-label, for every class, is the voxels above 0 in the first channel."""
    count, _, *sides = image.shape
    target = (image[:, :1] > 0).float().expand(count, classes, *sides)
    valid = torch.full((count, classes), pseudo_label)
    return UnlabeledPatches(image, target, torch.zeros_like(target), valid)


def step_of(
    student: nn.Module,
    teacher: nn.Module | None = None,
    labeled: bool = True,
    pseudo_label: bool = False,
    t: int = 3,
    total_steps: int = 10,
    seed: int = 0,
    count: int = 2,
    classes: int = 1,
) -> TrainingStep:
    """Return a step of noise, labeled where it is above 0; the teacher is a copy of the student by default."""
    image, known = noise(count, 1, *SIDES, seed=1), noise(2, 1, *SIDES, seed=2)
    return TrainingStep(
        t=t,
        total_steps=total_steps,
        student=student,
        teacher=copy.deepcopy(student) if teacher is None else teacher,
        labeled=LabeledPatches(known, (known[:, 0] > 0).to(torch.uint8), student(known)) if labeled else None,
        unlabeled=unlabeled_batch(image, classes, pseudo_label),
        consistency_weight=0.1,
        generalist_weight=0.7,
        generator=torch.Generator().manual_seed(seed),
    )


def specialist(seed: int = 0) -> nn.Module:
    return new_specialist(tiny_plan(f"seed={seed}"))


def losses_of(name: str, step: TrainingStep) -> RegularizerLosses:
    return built(name).losses(step)


def student_loss(name: str, step: TrainingStep) -> Tensor:
    loss = losses_of(name, step).student
    assert loss is not None
    return loss


def flat_gradient(network: nn.Module) -> Tensor:
    """Return all gradients of a network in one vector, zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in network.parameters()])


class Fixed(nn.Module):
    """A network with one parameter that returns the same logits for every patch.

    Args:
        logits: (C, H, W, D).
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.expand(len(image), *self.logits.shape)
