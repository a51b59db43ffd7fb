"""Interpolation consistency training (Verma et al., IJCAI 2019): predictions mix as the scans do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from semisam_core.losses import consistency_loss
from semisam_core.regularizers.base import RegularizerLosses, TrainingStep

ALPHA = 0.2


class InterpolationConsistency:
    """Mean squared difference of f(mix(u_i, u_j)) and mix(f'(u_i), f'(u_j)).

    f are the student's probabilities, f' the teacher's; mix(a, b) = m a + (1 - m) b with one m ~ Beta(0.2, 0.2) per
    step. Each patch is mixed with the next of the batch, the last with the first. A batch of one has nothing to mix.
    """

    auxiliary = None

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the consistency loss at the interpolated patches."""
        image, share = step.unlabeled.image, draw_share(step.generator)
        with torch.no_grad():
            target = mix_with_next(step.teacher(image).softmax(1), share)
        student = step.student(mix_with_next(image, share)).softmax(1)
        return RegularizerLosses(consistency_loss(student, target))


def mix_with_next(batch: Tensor, share: float) -> Tensor:
    """Return share * batch + (1 - share) * (the batch rolled by one) along the first axis."""
    return share * batch + (1 - share) * batch.roll(-1, 0)


def draw_share(generator: torch.Generator) -> float:
    """Draw m ~ Beta(0.2, 0.2)."""
    # torch's Beta distribution takes no generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(ALPHA, ALPHA))
