"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017): agree with the teacher's view of a noisy copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semisam_core.losses import consistency_loss

NOISE = 0.1
NOISE_LIMIT = 0.2


class MeanTeacher:
    """Mean squared difference of softmax probabilities; teacher input x + clamp(0.1 N(0, 1), -0.2, 0.2)."""

    def loss(self, student_logits: Tensor, teacher: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return the consistency loss; see `Regularizer.loss`."""
        noise = torch.randn(batch.shape, generator=generator).to(batch.device)
        with torch.no_grad():
            answer = teacher(batch + (NOISE * noise).clamp(-NOISE_LIMIT, NOISE_LIMIT)).softmax(1)
        return consistency_loss(student_logits.softmax(1), answer)
