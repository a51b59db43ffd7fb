"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019): agree with the teacher where it is certain."""

from __future__ import annotations

import math

import torch

from semisam_core.losses import consistency_weight
from semisam_core.regularizers.base import Losses, Step
from semisam_core.regularizers.mean_teacher import noisy_answer

PASSES = 8


class UncertaintyAwareMeanTeacher:
    """Mean teacher over the voxels v at which the teacher is certain, H_v < threshold(t).

        L = sum_v [H_v < threshold(t)] d_v / sum_v [H_v < threshold(t)]

    d_v is the squared difference of student and teacher, averaged over the channels as in mean teacher, so that one
    weight means the same for both. H = -sum_c pbar_c ln pbar_c, pbar being the mean of 8 noisy teacher passes; the
    teacher's target is a ninth. Without a certain voxel the loss is 0.

    The paper perturbs by dropout besides noise; a specialist without dropout leaves the noise alone.
    """

    own = None

    def losses(self, step: Step) -> Losses:
        """Return the masked consistency loss; see `Regularizer.losses`."""
        image, generator = step.unlabeled.image, step.generator
        answer = noisy_answer(step.teacher, image, generator)  # (B, 1 + K, H, W, D)
        mean = noisy_answer(step.teacher, image, generator) / PASSES
        for _ in range(PASSES - 1):
            mean += noisy_answer(step.teacher, image, generator) / PASSES
        entropy = torch.special.entr(mean).sum(1)  # (B, H, W, D)
        certain = entropy < threshold(step.t, step.total_steps, mean.shape[1])
        difference = ((step.logits.softmax(1) - answer) ** 2).mean(1)
        return Losses((difference * certain).sum() / certain.sum().clamp_min(1))


def threshold(t: int, total_steps: int, channels: int) -> float:
    """Return the largest entropy that counts as certain, (0.75 + 0.25 exp(-5 (1 - t/T)^2)) ln C.

    ln C is the entropy of a guess among C channels, background included: the paper's ln 2 for one class.
    """
    return (0.75 + 0.25 * consistency_weight(t, total_steps, 1.0)) * math.log(channels)
