"""Cross pseudo supervision (Chen et al., CVPR 2021): two networks, each learning from the other's prediction."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from semisam_core.losses import confidence_aware_loss, supervised_loss
from semisam_core.optimizers import build_optimizer, learning_rate
from semisam_core.regularizers.auxiliary_networks import AuxiliaryNetworks, initial_seed
from semisam_core.regularizers.base import RegularizerContext, RegularizerLosses, TrainingStep


class CrossPseudoSupervision:
    """Cross-entropy of the student with the second network's most probable class as target, and vice versa.

    The student's loss is the mean over unlabeled voxels plus, where the site has labels, the mean over labeled voxels.
    The second network has the student's architecture and its own weights. It is trained like the student: with labels,
    with pseudo-labels and with the student's most probable class, each term weighted as the student's.
    """

    def __init__(self, context: RegularizerContext) -> None:
        training = context.training
        self._second = context.new_specialist(initial_seed(context.seed, "second")).to(context.device)
        self.auxiliary = AuxiliaryNetworks(
            {"second": self._second},
            lambda networks: build_optimizer(networks, training.optimizer),
            lambda t: learning_rate(t, training.total_steps, training.optimizer),
        )

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the losses of student and second network."""
        batch = step.unlabeled
        second = self._second(batch.image)
        student_loss, cross = _cross(step.logits, second), _cross(second, step.logits)
        auxiliary = second.new_zeros(())
        if step.labeled is not None:
            logits = self._second(step.labeled.image)
            student_loss = student_loss + _cross(step.labeled.logits, logits)
            cross = cross + _cross(logits, step.labeled.logits)
            auxiliary = auxiliary + supervised_loss(logits, step.labeled.label, step.labeled.annotated)
        if bool(batch.valid.any()):
            foreground = second.softmax(1)[:, 1:]
            generalist = confidence_aware_loss(foreground, batch.target, batch.uncertainty, batch.valid)
            auxiliary = auxiliary + step.generalist_weight * generalist
        return RegularizerLosses(student_loss, auxiliary + step.consistency_weight * cross)


def _cross(learner: Tensor, other: Tensor) -> Tensor:
    """Return the learner's mean cross-entropy with the other's most probable class; both are logits (B, C, H, W, D)."""
    return functional.cross_entropy(learner, other.detach().argmax(1))
