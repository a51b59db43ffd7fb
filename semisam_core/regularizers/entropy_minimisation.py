"""Entropy minimisation (Grandvalet and Bengio, NeurIPS 2004; per voxel: Vu et al., ADVENT, CVPR 2019)."""

from __future__ import annotations

import math

from semisam_core.regularizers.base import RegularizerLosses, TrainingStep


class EntropyMinimisation:
    """Mean over voxels of the student's normalised entropy, -sum_c p_c ln p_c / ln C, between 0 and 1.

    It rewards any confident prediction, right or wrong. Without labels or pseudo-labels to counteract it, the student
    may collapse to one class.
    """

    auxiliary = None

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the normalised entropy."""
        log_probability = step.logits.log_softmax(1)  # (B, 1 + K, H, W, D)
        entropy = -(log_probability.exp() * log_probability).sum(1)
        return RegularizerLosses(entropy.mean() / math.log(log_probability.shape[1]))
