"""The size of what the sources find together, held to that of the labels.

The mean over sources that overlap only partly is too small, and so is what a network finds that has seen few labels.
The ranking of voxels is still good then: only the threshold is wrong. The labels tell where it should be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from semisam_core.scratch import Scratch

REACH = 0.1  # no voxel below this probability becomes foreground, none above 1 - REACH background
_SURE = 1e-6


def at_plausible_volume(
    probability: Tensor, expected: float | None, tolerance: float, scratch: Scratch | None = None
) -> Tensor:
    """Shift a class's log odds, in place, until as many voxels as plausible are above 0.5; their order stays.

    A class whose volume is plausible, or of which no volume is known, stays as it is.

    Args:
        probability: of the class (H, W, D).
        expected: its expected number of voxels, or None.
        tolerance: how many times smaller or larger a plausible volume may be, at least 1.
        scratch: where the probability is, if not in memory.
    """
    scratch = scratch or Scratch()
    if expected is None or expected < 1:
        return probability
    found = sum([int((each > 0.5).sum()) for (each,) in scratch.blocks(probability)])
    wanted = round(min(max(found, expected / tolerance), expected * tolerance, probability.numel() - 1))
    if wanted == found:
        return probability
    ranks = [wanted, wanted + 1] if wanted else [1]
    middle = torch.tensor(largest(probability, ranks, scratch), dtype=probability.dtype).mean()
    threshold = middle.clamp(REACH, 1 - REACH)
    for (each,) in scratch.blocks(probability):
        each.copy_(torch.sigmoid(each.clamp(_SURE, 1 - _SURE).logit() - threshold.logit()))
    return probability


def largest(values: Tensor, ranks: Sequence[int], scratch: Scratch | None = None) -> list[float]:
    """Return the r-th largest value for each rank r, from 1, without a copy of the values.

    Numbers that are not negative have the order of their bits. So they are counted by their upper 16 bits; those that
    share them with the one that is looked for, by the next 16; and so on.

    Args:
        values: float32 or float64, none negative or NaN.
        ranks: each from 1 to the number of values.
        scratch: where the values are, if not in memory.
    """
    scratch, found = scratch or Scratch(), []
    kind = np.dtype(np.int32 if values.dtype is torch.float32 else np.int64)
    for rank in ranks:
        prefix, left = 0, rank
        for shift in range(8 * kind.itemsize - 16, -1, -16):
            counts = np.zeros(1 << 16, np.int64)
            for (each,) in scratch.blocks(values):
                codes = (each + 0.0).numpy().view(kind) >> shift  # + 0.0 makes 0.0 of -0.0
                counts += np.bincount(codes[codes >> 16 == prefix] & 0xFFFF, minlength=len(counts))
            above = np.cumsum(counts[::-1])[::-1]  # of each code or a greater one
            code = int(np.flatnonzero(above >= left)[-1])
            prefix, left = prefix << 16 | code, left - int(above[code] - counts[code])
        found.append(float(np.array(prefix, kind).view(f"f{kind.itemsize}")))
    return found
