"""The size of what the sources find together, held to that of the labels.

The mean over sources that overlap only partly is too small, and so is what a network finds that has seen few labels.
The ranking of voxels is still good then: only the threshold is wrong. The labels tell where it should be.
"""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 0.1  # no voxel below this probability becomes foreground, none above 1 - REACH background
_SURE = 1e-6


def at_plausible_volume(probability: Tensor, expected: float | None, tolerance: float) -> Tensor:
    """Shift a class's log odds until as many voxels as plausible are above 0.5; their order stays.

    A class whose volume is plausible, or of which no volume is known, stays as it is.

    Args:
        probability: of the class (H, W, D).
        expected: its expected number of voxels, or None.
        tolerance: how many times smaller or larger a plausible volume may be, at least 1.
    """
    if expected is None or expected < 1:
        return probability
    found = int((probability > 0.5).sum())
    wanted = round(min(max(found, expected / tolerance), expected * tolerance, probability.numel() - 1))
    if wanted == found:
        return probability
    threshold = probability.flatten().topk(wanted + 1).values[-2:].mean().clamp(REACH, 1 - REACH)
    return torch.sigmoid(probability.clamp(_SURE, 1 - _SURE).logit() - threshold.logit())
