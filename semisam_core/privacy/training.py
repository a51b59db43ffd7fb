"""One site's local training for one round with differential privacy of its patients."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.contract import travelling
from semisam_core.data.patches import Batch, PatchStream
from semisam_core.errors import CaseError
from semisam_core.losses import teacher_decay
from semisam_core.optimizers import build_optimizer, learning_rate
from semisam_core.plan import Plan
from semisam_core.plan_sections.privacy import Privacy
from semisam_core.prefetch import Prefetch
from semisam_core.privacy.gradients import PatientOptimizer, patient_gradient
from semisam_core.privacy.networks import check_network
from semisam_core.privacy.randomness import Randomness
from semisam_core.training import Loader, LocalRound, LossTerms, TrainingResult, update_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Patient:
    """One patient's scans.

    Attributes:
        id: distinguishes the site's patients; its patches depend on it and not on who else is there.
        labeled: loaders of the labeled scans; may be empty.
        unlabeled: loaders of the unlabeled scans; may be empty.
    """

    id: str
    labeled: Sequence[Loader] = ()
    unlabeled: Sequence[Loader] = ()


@dataclass(frozen=True)
class _Drawn:
    """A patient that takes part in a step: patches of labeled and of unlabeled scans, and the patient's own seed."""

    labeled: Batch | None
    unlabeled: Batch | None
    seed: int


def train_private_round(local: LocalRound, patients: Sequence[Patient], randomness: Randomness) -> TrainingResult:
    """Train the specialist for one round as `train_round` does, with noise; see `Privacy` for the step.

    Every step is taken, whoever is drawn: how many there are says nothing about any patient. The proximal term and
    weight decay depend on no patient and are added without noise.

    Args:
        local: the round; its plan must have `privacy`, and its lists of loaders are not used.
        patients: every patient that the site trains on.
        randomness: source of the noise and of who takes part.

    Returns:
        Steps taken (0 without patients) and mean losses over the patients that took part; the latter must not leave.

    Raises:
        FloatingPointError: a weight is no longer finite; discard the weights.
        ValueError: the plan has no `privacy`, or the network does not keep patches apart.
    """
    trainer = _PrivateTrainer(local, patients, randomness)
    per_round = local.plan.training.steps_per_round
    steps = per_round if patients else 0
    first = (local.number - 1) * per_round
    with Prefetch(trainer.draw, steps) as draws:
        for step in range(steps):
            trainer.step(draws.next(), first + step)
            if local.progress is not None:
                local.progress(step + 1, steps)
    if not all(bool(torch.isfinite(each).all()) for each in local.specialist.parameters()):
        raise FloatingPointError(f"a weight is no longer finite after round {local.number}")
    return TrainingResult(steps, trainer.losses, {}, draws.waited_s)


class _PrivateTrainer:
    """The state of one round: who is drawn, terms of the loss, optimizer."""

    def __init__(self, local: LocalRound, patients: Sequence[Patient], randomness: Randomness) -> None:
        self._plan, self._settings, self._seed = local.plan, _settings_of(local.plan), local.seed
        self._patients, self._randomness = patients, randomness
        self._terms = LossTerms(local)
        specialist = self._terms.specialist
        check_network(specialist)
        optimizer = local.optimizer or build_optimizer(specialist, local.plan.training.optimizer)
        self._optimizer = PatientOptimizer(optimizer, self._settings, max(1, len(patients)), randomness)
        sent = travelling(local.plan, specialist)
        shared = [value for name, value in specialist.named_parameters() if name in sent]
        self._shared = [(value, value.detach().clone()) for value in shared] if self._proximal > 0 else []
        self._next = 0  # the step to draw for, within the round

    @property
    def losses(self) -> dict[str, float]:
        """The mean so far of each term that has applied."""
        return self._terms.means

    def draw(self) -> list[_Drawn]:
        """Return who takes part in the next step, with their patches."""
        step, self._next = self._next, self._next + 1
        chosen = self._randomness.chosen(len(self._patients), self._settings.sampling_rate)
        drawn = (self._patches(self._patients[k], step) for k in chosen)
        return [each for each in drawn if each is not None]

    def step(self, drawn: Sequence[_Drawn], t: int) -> None:
        """Take optimizer step t of the generation."""
        for patient in drawn:
            loss = self._loss(patient, t)
            gradient = None if loss is None else patient_gradient(loss, self._optimizer.parameters)
            if gradient is not None:
                self._optimizer.add(gradient)
        training = self._plan.training
        self._optimizer.step(learning_rate(t, training.total_steps, training.optimizer), self._add_proximal)
        update_teacher(self._terms.teacher, self._terms.specialist, teacher_decay(t, self._plan.teacher.decay))

    def _patches(self, patient: Patient, step: int) -> _Drawn | None:
        """Return a patient's patches; None, so that it contributes nothing, if a scan cannot be read any more."""
        seed = _patient_seed(self._seed, step, patient.id)
        scans = (patient.labeled, patient.unlabeled if self._plan.uses_unlabeled else ())
        try:
            labeled, unlabeled = (
                _batch(each, self._plan, self._settings.patches_per_patient, seed + k) for k, each in enumerate(scans)
            )
        except (CaseError, OSError) as error:
            logger.warning("A scan cannot be read, so its patient is left out of a step: %s", error)
            return None
        return _Drawn(labeled, unlabeled, seed + len(scans))

    def _loss(self, patient: _Drawn, t: int) -> Tensor | None:
        """Return the sum of all terms of one patient; None where none applies."""
        generator = torch.Generator().manual_seed(patient.seed)
        terms, _ = self._terms.of((patient.labeled, patient.unlabeled), t, generator)
        return torch.stack(list(terms.values())).sum() if terms else None

    @property
    def _proximal(self) -> float:
        return self._plan.training.proximal

    def _add_proximal(self) -> None:
        """Add the gradient of FedProx's term, mu (w - w_global)."""
        for value, start in self._shared:
            if value.grad is not None:
                value.grad += self._proximal * (value.detach() - start)


def _settings_of(plan: Plan) -> Privacy:
    if plan.privacy is None:
        raise ValueError("the plan has no privacy section")
    return plan.privacy


def _batch(scans: Sequence[Loader], plan: Plan, count: int, seed: int) -> Batch | None:
    return PatchStream(lambda k: scans[k](), len(scans), plan, count, seed).next() if scans else None


def _patient_seed(seed: int, step: int, patient: str) -> int:
    """Return a seed below 2**31 - 2 that depends on these alone."""
    digest = hashlib.sha256(f"{seed}|{step}|{patient}".encode()).digest()
    return int.from_bytes(digest[:4]) % (2**31 - 3)
