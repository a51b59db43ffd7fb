"""The threshold at which a combination of sources becomes a mask.

Where sources overlap only partly, their mean is above 0.5 on too few voxels, and so is what a network finds that has
seen few labels, though both rank voxels well. The mask with the highest expected Dice includes less likely voxels the
less sure the sources are: its threshold is half the Dice that it can expect (Lipton et al., ECML PKDD 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 0.05  # below it a voxel is background: a scan has so many of them that together they would count
_SURE = 1e-6


def best_threshold(probability: Tensor) -> float:
    """Return the threshold of the mask with the highest expected Dice, 2 sum(p in mask) / (voxels in mask + sum(p)).

    0.5 if no voxel has a probability above `NEGLIGIBLE`.

    Args:
        probability: of foreground, any shape.
    """
    ranked = probability[probability > NEGLIGIBLE].double().sort(descending=True).values
    if not len(ranked):
        return 0.5
    found = ranked.cumsum(0)
    size = torch.arange(1, len(ranked) + 1, dtype=torch.float64, device=ranked.device)
    best = int((2 * found / (size + found[-1])).argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else torch.tensor(NEGLIGIBLE)
    return (float(ranked[best]) + float(below)) / 2


def centred(foreground: Tensor) -> Tensor:
    """Shift the log odds of each class (K, H, W, D) so that its best threshold becomes 0.5."""
    return torch.stack([_shifted(p, best_threshold(p)) for p in foreground])


def _shifted(probability: Tensor, threshold: float) -> Tensor:
    limits = probability.clamp(_SURE, 1 - _SURE), torch.tensor(threshold).clamp(_SURE, 1 - _SURE)
    return torch.sigmoid(limits[0].logit() - limits[1].logit())
