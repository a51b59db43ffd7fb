"""Cross pseudo supervision (Chen et al., CVPR 2021): two networks, each taught by the other's answer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from semisam_core.losses import confidence_aware_loss, supervised_loss
from semisam_core.optimizers import build_optimizer, learning_rate
from semisam_core.regularizers.base import Losses, RegularizerContext, Step
from semisam_core.regularizers.own_networks import OwnNetworks, initial_seed


class CrossPseudoSupervision:
    """Cross-entropy of the student against the second network's most probable class, and the other way round.

    The student's loss is the mean over the unlabeled voxels plus, where the site has labels, the mean over the labeled
    ones. The second network is another specialist with weights of its own, trained as the student is: supervised, by
    pseudo-labels, and by the student's most probable class, each term at the student's weight.

    Args:
        context: architecture, optimizer and schedule, which both networks share.
    """

    def __init__(self, context: RegularizerContext) -> None:
        training = context.training
        self._second = context.new_specialist(initial_seed(context.seed, "second")).to(context.device)
        self.own = OwnNetworks(
            {"second": self._second},
            lambda networks: build_optimizer(networks, training.optimizer),
            lambda t: learning_rate(t, training.total_steps, training.optimizer),
        )

    def losses(self, step: Step) -> Losses:
        """Return the losses of student and second network; see `Regularizer.losses`."""
        batch = step.unlabeled
        second = self._second(batch.image)
        student_loss, cross = _cross(step.logits, second), _cross(second, step.logits)
        own = second.new_zeros(())
        if step.labeled is not None:
            answer = self._second(step.labeled.image)
            student_loss = student_loss + _cross(step.labeled.logits, answer)
            cross = cross + _cross(answer, step.labeled.logits)
            own = own + supervised_loss(answer, step.labeled.label, step.labeled.annotated)
        if bool(batch.valid.any()):
            foreground = second.softmax(1)[:, 1:]
            taught = confidence_aware_loss(foreground, batch.target, batch.uncertainty, batch.valid)
            own = own + step.generalist_weight * taught
        return Losses(student_loss, own + step.consistency_weight * cross)


def _cross(learner: Tensor, other: Tensor) -> Tensor:
    """Return the learner's mean cross-entropy against the other's most probable class; both logits (B, C, H, W, D)."""
    return functional.cross_entropy(learner, other.detach().argmax(1))
