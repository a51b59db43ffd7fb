"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017): agree with the teacher's view of a noisy copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semisam_core.losses import consistency_loss
from semisam_core.regularizers.base import Losses, Step

NOISE = 0.1
NOISE_LIMIT = 0.2


class MeanTeacher:
    """Mean squared difference of softmax probabilities; teacher input x + clamp(0.1 N(0, 1), -0.2, 0.2)."""

    own = None

    def losses(self, step: Step) -> Losses:
        """Return the consistency loss; see `Regularizer.losses`."""
        answer = noisy_answer(step.teacher, step.unlabeled.image, step.generator)
        return Losses(consistency_loss(step.logits.softmax(1), answer))


def noisy_answer(teacher: nn.Module, image: Tensor, generator: torch.Generator) -> Tensor:
    """Return the teacher's probabilities for x + clamp(0.1 N(0, 1), -0.2, 0.2), without a gradient.

    Args:
        teacher: the network that is asked.
        image: patches x, (B, C, H, W, D).
        generator: source of the noise, on the CPU.

    Returns:
        (B, 1 + K, H, W, D).
    """
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    with torch.no_grad():
        probability: Tensor = teacher(image + (NOISE * noise).clamp(-NOISE_LIMIT, NOISE_LIMIT)).softmax(1)
    return probability
