"""One site's local training for one round."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semisam_core.data.patches import Batch, PatchStream, TrainingScan
from semisam_core.losses import (
    confidence_aware_loss,
    consistency_weight,
    generalist_weight,
    supervised_loss,
    teacher_decay,
)
from semisam_core.plan import Optimizer, Plan
from semisam_core.regularizers import build_regularizer

GRADIENT_NORM = 10.0


@dataclass(frozen=True)
class TrainingResult:
    """Means over the round's steps of each unweighted loss term; None where the term did not apply."""

    steps: int
    supervised: float | None
    consistency: float | None
    generalist: float | None


def train_round(
    plan: Plan,
    specialist: nn.Module,
    teacher: nn.Module,
    labeled: Sequence[Callable[[], TrainingScan]],
    unlabeled: Sequence[Callable[[], TrainingScan]],
    round_number: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Train the specialist in place for one round, and move the teacher after it.

    L = L_sup + lambda_c(t) L_unsup + lambda_s(t) L_sam, t counting optimizer steps over the whole study.

    Args:
        plan: the study plan.
        specialist: the student, with the weights the server sent.
        teacher: its exponential moving average.
        labeled: loaders of the site's labeled scans; may be empty.
        unlabeled: loaders of the site's unlabeled scans, with accepted pseudo-labels attached; may be empty.
        round_number: counts from 1.
        seed: seed of this site's round.
        device: where to compute.
        on_step: told (step, steps of the round) after each step.

    Returns:
        Steps taken (0 where the site has nothing to learn from under this plan) and mean losses.

    Raises:
        FloatingPointError: a loss is not finite; the weights must then not be used.
    """
    trainer = _Trainer(plan, specialist, teacher, labeled, unlabeled, seed, device)
    steps = plan.training.steps_per_round if trainer.has_work else 0
    first = (round_number - 1) * plan.training.steps_per_round
    for step in range(steps):
        trainer.step(first + step)
        if on_step is not None:
            on_step(step + 1, steps)
    return trainer.result(steps)


def new_teacher(specialist: nn.Module) -> nn.Module:
    """Return a copy of the specialist that takes no gradient."""
    teacher = copy.deepcopy(specialist)
    teacher.requires_grad_(False)
    return teacher


def update_teacher(teacher: nn.Module, specialist: nn.Module, decay: float) -> None:
    """Move the teacher: theta' = decay * theta' + (1 - decay) * theta; buffers are copied."""
    with torch.no_grad():
        for ours, theirs in zip(teacher.parameters(), specialist.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)
        for kept, moved in zip(teacher.buffers(), specialist.buffers(), strict=True):
            kept.copy_(moved)


class _Trainer:
    """The state of one round: streams, optimizer, running means."""

    def __init__(
        self,
        plan: Plan,
        specialist: nn.Module,
        teacher: nn.Module,
        labeled: Sequence[Callable[[], TrainingScan]],
        unlabeled: Sequence[Callable[[], TrainingScan]],
        seed: int,
        device: torch.device,
    ) -> None:
        self._plan, self._device = plan, device
        self._specialist, self._teacher = specialist.to(device).train(), teacher.to(device).train()
        self._regularizer = build_regularizer(plan.regularizer.name)
        training = plan.training
        self._labeled = _stream(labeled, plan, training.labeled_batch, seed)
        self._unlabeled = _stream(unlabeled, plan, training.unlabeled_batch, seed + 1) if plan.uses_unlabeled else None
        self._generator = torch.Generator().manual_seed(seed + 2)
        self._optimizer = build_optimizer(specialist, training.optimizer)
        self._sums = {"supervised": [0.0, 0], "consistency": [0.0, 0], "generalist": [0.0, 0]}

    @property
    def has_work(self) -> bool:
        """Whether any term of the loss applies at this site."""
        return self._labeled is not None or self._unlabeled is not None

    def step(self, t: int) -> None:
        """Take optimizer step t of the study."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(t, self._plan.training.total_steps, self._plan.training.optimizer)
        terms = []
        if self._labeled is not None:
            batch = self._labeled.next()
            if batch.label is None:
                raise ValueError("a labeled stream must carry labels")
            logits = self._specialist(batch.image.to(self._device))
            terms.append(self._note("supervised", supervised_loss(logits, batch.label.to(self._device)), 1.0))
        if self._unlabeled is not None:
            terms += self._unlabeled_terms(self._unlabeled.next(), t)
        loss = torch.stack(terms).sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss became {loss.item()} at step {t}")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._specialist.parameters(), GRADIENT_NORM)
        self._optimizer.step()
        update_teacher(self._teacher, self._specialist, teacher_decay(t, self._plan.teacher.decay))

    def result(self, steps: int) -> TrainingResult:
        """Return the means so far."""
        means = {name: total / count if count else None for name, (total, count) in self._sums.items()}
        return TrainingResult(steps, means["supervised"], means["consistency"], means["generalist"])

    def _unlabeled_terms(self, batch: Batch, t: int) -> list[Tensor]:
        plan, terms = self._plan, []
        image = batch.image.to(self._device)
        logits = self._specialist(image)
        if self._regularizer is not None:
            ramp = plan.regularizer.ramp_share * plan.training.total_steps
            weight = consistency_weight(t, ramp, plan.regularizer.weight)
            loss = self._regularizer.loss(logits, self._teacher, image, self._generator)
            terms.append(self._note("consistency", loss, weight))
        policy = plan.pseudo_labels
        if policy is not None and bool(batch.valid.any()):
            weight = generalist_weight(t, plan.training.total_steps, policy.weight, policy.schedule)
            foreground = logits.softmax(1)[:, 1:]
            parts = (batch.target, batch.uncertainty, batch.valid)
            loss = confidence_aware_loss(foreground, *(part.to(self._device) for part in parts))
            terms.append(self._note("generalist", loss, weight))
        return terms or [logits.sum() * 0.0]

    def _note(self, name: str, loss: Tensor, weight: float) -> Tensor:
        total = self._sums[name]
        total[0] += loss.item()
        total[1] += 1
        return loss * weight


def build_optimizer(specialist: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Build the round's optimizer, without any state of earlier rounds."""
    if settings.name == "sgd":
        return torch.optim.SGD(
            specialist.parameters(),
            lr=settings.learning_rate,
            momentum=0.9,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(specialist.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def learning_rate(step: int, total_steps: int, settings: Optimizer) -> float:
    """Return lr(t) = lr * (final + (1 - final) (1 - t/T)^0.9), polynomial decay over the whole study."""
    remaining = (1 - min(step, total_steps) / total_steps) ** 0.9
    share: float = settings.final_share + (1 - settings.final_share) * remaining
    return settings.learning_rate * share


def _stream(scans: Sequence[Callable[[], TrainingScan]], plan: Plan, batch_size: int, seed: int) -> PatchStream | None:
    if not scans:
        return None
    return PatchStream(lambda k: scans[k](), len(scans), plan, batch_size, seed)
