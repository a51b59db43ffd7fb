"""Interpolation consistency training (Verma et al., IJCAI 2019): a mixed scan has the mixed answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from semisam_core.losses import consistency_loss
from semisam_core.regularizers.base import Losses, Step

ALPHA = 0.2


class InterpolationConsistency:
    """Mean squared difference of f(mix(u_i, u_j)) and mix(f'(u_i), f'(u_j)), probabilities f of student, f' of teacher.

    mix(a, b) = m a + (1 - m) b, one m ~ Beta(0.2, 0.2) a step. Each patch is mixed with the next one of the batch and
    the last with the first, so that none meets itself; a batch of one has nothing to mix.
    """

    own = None

    def losses(self, step: Step) -> Losses:
        """Return the consistency loss at the interpolation; see `Regularizer.losses`."""
        image, share = step.unlabeled.image, draw_share(step.generator)
        with torch.no_grad():
            answer = mix_with_next(step.teacher(image).softmax(1), share)
        student = step.student(mix_with_next(image, share)).softmax(1)
        return Losses(consistency_loss(student, answer))


def mix_with_next(batch: Tensor, share: float) -> Tensor:
    """Return share * batch + (1 - share) * (the batch moved up by one), over the first axis."""
    return share * batch + (1 - share) * batch.roll(-1, 0)


def draw_share(generator: torch.Generator) -> float:
    """Draw m ~ Beta(0.2, 0.2)."""
    # torch's Beta takes no generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(ALPHA, ALPHA))
