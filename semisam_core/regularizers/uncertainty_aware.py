"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019): match the teacher where it is certain."""

from __future__ import annotations

import math

import torch

from semisam_core.losses import consistency_weight
from semisam_core.regularizers.base import RegularizerLosses, TrainingStep
from semisam_core.regularizers.mean_teacher import noisy_prediction

PASSES = 8


class UncertaintyAwareMeanTeacher:
    """Mean teacher over the voxels v where the teacher is certain, H_v < threshold(t).

        L = sum_v [H_v < threshold(t)] d_v / sum_v [H_v < threshold(t)]

    d_v is the squared difference of student and teacher, averaged over channels as in mean teacher, so that
    `regularizer.weight` means the same for both. H = -sum_c pbar_c ln pbar_c, where pbar is the mean of 8 noisy teacher
    passes; the target is a ninth pass. The loss is 0 if no voxel is certain.

    The paper perturbs the teacher with dropout and noise; a specialist without dropout has only the noise.
    """

    auxiliary = None

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the masked consistency loss."""
        image, generator = step.unlabeled.image, step.generator
        target = noisy_prediction(step.teacher, image, generator)  # (B, 1 + K, H, W, D)
        mean = noisy_prediction(step.teacher, image, generator) / PASSES
        for _ in range(PASSES - 1):
            mean += noisy_prediction(step.teacher, image, generator) / PASSES
        entropy = torch.special.entr(mean).sum(1)  # (B, H, W, D)
        certain = entropy < threshold(step.t, step.total_steps, mean.shape[1])
        difference = ((step.logits.softmax(1) - target) ** 2).mean(1)
        return RegularizerLosses((difference * certain).sum() / certain.sum().clamp_min(1))


def threshold(t: int, total_steps: int, channels: int) -> float:
    """Return the entropy below which a voxel counts as certain, (0.75 + 0.25 exp(-5 (1 - t/T)^2)) ln C.

    ln C is the entropy of a uniform guess over C channels, background included: ln 2 for one class, as in the paper.
    """
    return (0.75 + 0.25 * consistency_weight(t, total_steps, 1.0)) * math.log(channels)
