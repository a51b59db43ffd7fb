"""Entropy minimisation (Grandvalet and Bengio, NeurIPS 2004; per voxel: Vu et al., ADVENT, CVPR 2019)."""

from __future__ import annotations

import math

from semisam_core.regularizers.base import Losses, Step


class EntropyMinimisation:
    """Mean over voxels of the student's entropy, -sum_c p_c ln p_c / ln C, which lies between 0 and 1.

    It rewards any certain answer, a wrong one as well. Where neither labels nor pseudo-labels hold against it, the
    student may end with one class everywhere.
    """

    own = None

    def losses(self, step: Step) -> Losses:
        """Return the entropy; see `Regularizer.losses`."""
        log_probability = step.logits.log_softmax(1)  # (B, 1 + K, H, W, D)
        entropy = -(log_probability.exp() * log_probability).sum(1)
        return Losses(entropy.mean() / math.log(log_probability.shape[1]))
