"""Flip consistency: a mirrored patch must get the mirrored prediction."""

import torch

from semisam_core.regularizers import RegularizerLosses, RegularizerSpec, TrainingStep, register_regularizer


class FlipConsistency:
    """Mean squared difference from the teacher's prediction of the patch mirrored, mirrored back."""

    auxiliary = None  # no networks of its own

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the loss; all randomness comes from the step's generator."""
        axis = 2 + int(torch.randint(3, (), generator=step.generator))  # of (B, C, H, W, D)
        with torch.no_grad():
            mirrored = step.teacher(step.unlabeled.image.flip(axis)).softmax(1).flip(axis)
        return RegularizerLosses((step.logits.softmax(1) - mirrored).square().mean())


SPEC = RegularizerSpec(
    build=lambda context: FlipConsistency(),
    not_private=None,  # a patient's loss depends on no other patient, so differential privacy may use it
)


def register() -> None:
    """Let plans say `regularizer: {name: flip-consistency}`."""
    register_regularizer("flip-consistency", SPEC)
