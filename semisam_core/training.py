"""One site's local training for one round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semisam_core.contract import travelling
from semisam_core.data.patches import Batch, PatchStream, TrainingScan
from semisam_core.losses import (
    confidence_aware_loss,
    confident_dice_loss,
    confident_entropy_loss,
    consistency_weight,
    generalist_weight,
    proximal_loss,
    supervised_loss,
    teacher_decay,
)
from semisam_core.optimizers import build_optimizer, descend, learning_rate
from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabelLoss
from semisam_core.prefetch import Prefetch
from semisam_core.progress import ProgressCallback
from semisam_core.regularizers import (
    LabeledPatches,
    Regularizer,
    RegularizerContext,
    RegularizerLosses,
    TrainingStep,
    UnlabeledPatches,
    build_regularizer,
)
from semisam_core.specialists import build_specialist


@dataclass(frozen=True)
class TrainingResult:
    """What a round's training did.

    Attributes:
        steps: optimizer steps taken.
        waited_s: how long they waited for patches.
        losses: term -> mean of the unweighted loss over the steps in which it applied; see `TERMS`.
        gradients: term -> norm of the weighted term's gradient at the last of these steps.
    """

    steps: int
    losses: Mapping[str, float]
    gradients: Mapping[str, float]
    waited_s: float = 0.0


TERMS = ("supervised", "consistency", "generalist")
Loader = Callable[[], TrainingScan]


@dataclass(frozen=True, eq=False)
class LocalRound:
    """One site's training in one round.

    Attributes:
        plan: the study plan.
        specialist: the student, starting from the global weights; trained in place.
        teacher: its exponential moving average; updated in place.
        labeled: loaders of the site's labeled scans; may be empty.
        unlabeled: loaders of the site's unlabeled scans, with accepted pseudo-labels; may be empty.
        number: the round within its generation, from 1.
        seed: seed of this site in this round.
        device: where to compute.
        regularizer: the plan's regularizer with the site's auxiliary networks, trained in place; None builds a new one.
        optimizer: the specialist's, its moments updated in place; None builds a new one.
        annotated: the classes (from 1) that the site annotates; None for all.
        progress: called with (steps taken, steps of the round) after each step.
    """

    plan: Plan
    specialist: nn.Module
    teacher: nn.Module
    labeled: Sequence[Loader]
    unlabeled: Sequence[Loader]
    number: int
    seed: int
    device: torch.device
    regularizer: Regularizer | None = None
    optimizer: torch.optim.Optimizer | None = None
    annotated: tuple[int, ...] | None = None
    progress: ProgressCallback | None = None


def train_round(local: LocalRound) -> TrainingResult:
    """Train the specialist for one round and update the teacher after each step, both in place.

    L = L_sup + lambda_c(t) L_unsup + lambda_s(t) L_sam + mu/2 ||w - w_global||^2, where t counts optimizer steps over
    the whole generation (see `TrainingSettings`), usually the whole study.

    Returns:
        Steps taken (0 where no loss term applies at this site), mean losses, and the size of each term's gradient.

    Raises:
        FloatingPointError: a loss is not finite; discard the weights.
    """
    trainer = _Trainer(local)
    per_round = local.plan.training.steps_per_round
    steps = per_round if trainer.has_work else 0
    with Prefetch(trainer.draw, steps) as patches:
        for step in range(steps):
            t = (local.number - 1) * per_round + step
            trainer.step(patches.next(), t, measured=step == steps - 1)
            if local.progress is not None:
                local.progress(step + 1, steps)
    return TrainingResult(steps, trainer.losses, trainer.gradients, patches.waited_s)


def new_regularizer(plan: Plan, device: torch.device) -> Regularizer | None:
    """Return the plan's regularizer with newly initialised auxiliary networks, or None if the plan has none."""
    chosen, channels, classes = plan.specialist, len(plan.task.channels), len(plan.task.classes)

    def new_specialist(seed: int) -> nn.Module:
        return build_specialist(chosen.name, chosen.arguments, channels, classes, seed)

    context = RegularizerContext(plan.seed, channels, classes, plan.training, new_specialist, device)
    return build_regularizer(plan.regularizer.name, context)


def new_teacher(specialist: nn.Module) -> nn.Module:
    """Return a copy of the specialist that takes no gradient."""
    teacher = copy.deepcopy(specialist)
    teacher.requires_grad_(False)
    return teacher


def update_teacher(teacher: nn.Module, specialist: nn.Module, decay: float) -> None:
    """Update the teacher in place: theta' = decay * theta' + (1 - decay) * theta; buffers are copied."""
    with torch.no_grad():
        for average, current in zip(teacher.parameters(), specialist.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for buffer, source in zip(teacher.buffers(), specialist.buffers(), strict=True):
            buffer.copy_(source)


def pseudo_label_loss(student: Tensor, batch: UnlabeledPatches, weights: PseudoLabelLoss) -> Tensor:
    """Return L_sam of the student's probabilities p, (B, K, H, W, D): the sum of its weighted parts."""
    parts = {
        confidence_aware_loss: weights.squared,
        confident_entropy_loss: weights.cross_entropy,
        confident_dice_loss: weights.dice,
    }
    taught = (batch.target, batch.uncertainty, batch.valid)
    return torch.stack([weight * part(student, *taught) for part, weight in parts.items() if weight > 0]).sum()


class LossTerms:
    """The weighted terms of the loss on a step's patches, and the running mean of each, unweighted.

    Args:
        local: the round; its networks are moved to its device.

    Attributes:
        specialist: the student, in training mode.
        teacher: its moving average.
        auxiliary: the regularizer's own networks, or None.
    """

    def __init__(self, local: LocalRound) -> None:
        self._plan, self._device, self._annotated = local.plan, local.device, local.annotated
        self._regularizer = local.regularizer or new_regularizer(local.plan, local.device)
        self.auxiliary = None if self._regularizer is None else self._regularizer.auxiliary
        self.specialist = local.specialist.to(local.device).train()
        self.teacher = local.teacher.to(local.device).train()
        self._sums = {term: [0.0, 0] for term in TERMS}

    @property
    def means(self) -> dict[str, float]:
        """The mean so far of each term that has applied."""
        return {term: total / count for term, (total, count) in self._sums.items() if count}

    def of(
        self, patches: tuple[Batch | None, Batch | None], t: int, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return term -> its weighted loss, attached to the student's graph, and the auxiliary networks' loss or None.

        Args:
            patches: of labeled and of unlabeled scans.
            t: step of the generation.
            generator: the regularizer's randomness, on the CPU.
        """
        labeled = self._labeled_patches(patches[0])
        terms: dict[str, Tensor] = {}
        if labeled is not None:
            loss = supervised_loss(labeled.logits, labeled.label, self._annotated)
            terms["supervised"] = self._weighted("supervised", loss, 1.0)
        if patches[1] is None:
            return terms, None
        step = self._training_step(labeled, patches[1], t, generator)
        losses = RegularizerLosses(None) if self._regularizer is None else self._regularizer.losses(step)
        return terms | self._unlabeled_terms(step, losses.student), losses.auxiliary

    def _labeled_patches(self, batch: Batch | None) -> LabeledPatches | None:
        if batch is None:
            return None
        if batch.label is None:
            raise ValueError("a loader of a labeled scan returned a scan without a label")
        image = batch.image.to(self._device)
        return LabeledPatches(image, batch.label.to(self._device), self.specialist(image), self._annotated)

    def _training_step(
        self, labeled: LabeledPatches | None, batch: Batch, t: int, generator: torch.Generator
    ) -> TrainingStep:
        plan, total, policy = self._plan, self._plan.training.total_steps, self._plan.pseudo_labels
        device = self._device
        return TrainingStep(
            t=t,
            total_steps=total,
            student=self.specialist,
            teacher=self.teacher,
            labeled=labeled,
            unlabeled=UnlabeledPatches(
                image=batch.image.to(device),
                target=batch.target.to(device),
                uncertainty=batch.uncertainty.to(device),
                valid=batch.valid.to(device),
            ),
            consistency_weight=consistency_weight(t, plan.regularizer.ramp_share * total, plan.regularizer.weight),
            generalist_weight=(
                generalist_weight(t, total, policy.weight, policy.schedule, policy.ramp_share) if policy else 0.0
            ),
            generator=generator,
        )

    def _unlabeled_terms(self, step: TrainingStep, consistency: Tensor | None) -> dict[str, Tensor]:
        batch, terms = step.unlabeled, {}
        if consistency is not None:
            terms["consistency"] = self._weighted("consistency", consistency, step.consistency_weight)
        if self._plan.pseudo_labels is not None and bool(batch.valid.any()):
            foreground = step.logits.softmax(1)[:, 1:]
            loss = pseudo_label_loss(foreground, batch, self._plan.pseudo_labels.loss)
            terms["generalist"] = self._weighted("generalist", loss, step.generalist_weight)
        return terms or {"none": step.logits.sum() * 0.0}

    def _weighted(self, name: str, loss: Tensor, weight: float) -> Tensor:
        """Add the loss to its running mean and return it weighted."""
        total = self._sums[name]
        total[0] += loss.item()
        total[1] += 1
        return loss * weight


class _Trainer:
    """The state of one round: patch streams, optimizer, terms of the loss."""

    def __init__(self, local: LocalRound) -> None:
        plan, training = local.plan, local.plan.training
        self._plan, self._terms = plan, LossTerms(local)
        self._specialist = self._terms.specialist
        self._labeled = _stream(local.labeled, plan, training.labeled_batch, local.seed)
        unlabeled = local.unlabeled if plan.uses_unlabeled else ()
        self._unlabeled = _stream(unlabeled, plan, training.unlabeled_batch, local.seed + 1)
        self._generator = torch.Generator().manual_seed(local.seed + 2)
        self._optimizer = local.optimizer or build_optimizer(self._specialist, training.optimizer)
        sent = travelling(plan, self._specialist)
        self._shared = [value for name, value in self._specialist.named_parameters() if name in sent]
        self._start = [value.detach().clone() for value in self._shared] if training.proximal > 0 else []
        self.gradients: dict[str, float] = {}

    @property
    def has_work(self) -> bool:
        """Whether any term of the loss applies at this site."""
        return self._labeled is not None or self._unlabeled is not None

    @property
    def losses(self) -> dict[str, float]:
        """The mean so far of each term that has applied."""
        return self._terms.means

    def draw(self) -> tuple[Batch | None, Batch | None]:
        """Return the next step's patches of labeled and of unlabeled scans."""
        labeled, unlabeled = (None if each is None else each.next() for each in (self._labeled, self._unlabeled))
        return labeled, unlabeled

    def step(self, patches: tuple[Batch | None, Batch | None], t: int, measured: bool) -> None:
        """Take optimizer step t of the study; `measured`: note the size of each term's gradient first."""
        terms, auxiliary = self._terms.of(patches, t, self._generator)
        if measured:
            self.gradients = {term: self._gradient_norm(terms[term]) for term in TERMS if term in terms}
        if self._start:
            terms["proximal"] = self._plan.training.proximal * proximal_loss(self._shared, self._start)
        rate = learning_rate(t, self._plan.training.total_steps, self._plan.training.optimizer)
        descend(self._optimizer, torch.stack(list(terms.values())).sum(), rate, t)
        if auxiliary is not None and self._terms.auxiliary is not None:
            self._terms.auxiliary.step(auxiliary, t)
        update_teacher(self._terms.teacher, self._specialist, teacher_decay(t, self._plan.teacher.decay))

    def _gradient_norm(self, term: Tensor) -> float:
        trained = [value for value in self._specialist.parameters() if value.requires_grad]
        found = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        parts = [each.norm() for each in found if each is not None]
        return float(torch.stack(parts).norm()) if parts else 0.0


def _stream(scans: Sequence[Loader], plan: Plan, batch_size: int, seed: int) -> PatchStream | None:
    if not scans:
        return None
    return PatchStream(lambda k: scans[k](), len(scans), plan, batch_size, seed)
