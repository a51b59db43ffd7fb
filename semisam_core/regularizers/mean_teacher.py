"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017): match the teacher's prediction for a noisy copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semisam_core.losses import consistency_loss
from semisam_core.regularizers.base import RegularizerLosses, TrainingStep

NOISE = 0.1
NOISE_LIMIT = 0.2


class MeanTeacher:
    """Mean squared difference of softmax probabilities; teacher input x + clamp(0.1 N(0, 1), -0.2, 0.2)."""

    auxiliary = None

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the consistency loss."""
        target = noisy_prediction(step.teacher, step.unlabeled.image, step.generator)
        return RegularizerLosses(consistency_loss(step.logits.softmax(1), target))


def noisy_prediction(teacher: nn.Module, image: Tensor, generator: torch.Generator) -> Tensor:
    """Return the teacher's probabilities for x + clamp(0.1 N(0, 1), -0.2, 0.2), without gradient.

    Args:
        teacher: network from (B, C, H, W, D) to logits (B, 1 + K, H, W, D).
        image: patches x, (B, C, H, W, D).
        generator: source of the noise, on the CPU.

    Returns:
        (B, 1 + K, H, W, D).
    """
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    with torch.no_grad():
        probability: Tensor = teacher(image + (NOISE * noise).clamp(-NOISE_LIMIT, NOISE_LIMIT)).softmax(1)
    return probability
