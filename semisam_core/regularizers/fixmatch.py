"""Strong and weak views (UniMatch, Yang et al., CVPR 2023; FixMatch, Sohn et al., NeurIPS 2020), for whole patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from semisam_core.regularizers.auxiliary_networks import AuxiliaryNetworks
from semisam_core.regularizers.base import RegularizerLosses, TrainingStep

CONFIDENCE = 0.95
VIEWS = 2
GAIN, SHIFT, NOISE = 0.5, 0.5, 0.3  # strengths, for intensities of unit variance
HOLE_SHARE = 0.4  # of each side of a patch, the side of the box that is blanked


class FixMatch:
    """Cross-entropy of the student's strongly augmented views against the teacher's most probable class.

        L = mean over two strong views of sum_v [max p'_v >= 0.95] CE(f(strong(u))_v, argmax p'_v) / voxels

    p' is the teacher's answer to the weak view, which is the patch as the stream drew it. Strong views change
    intensities (gain, shift, gamma-free noise) and blank a box: nothing that moves a voxel, so answers stay comparable.
    As in both papers the sum is divided by all voxels, so that few certain ones count little.
    """

    auxiliary: AuxiliaryNetworks | None = None

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the loss over both strong views; see `Regularizer.losses`."""
        image = step.unlabeled.image
        with torch.no_grad():
            confidence, answer = step.teacher(image).softmax(1).max(1)  # (B, H, W, D)
        certain = (confidence >= CONFIDENCE).to(image.dtype)
        views = [strong_view(image, step.generator) for _ in range(VIEWS)]
        losses = [functional.cross_entropy(step.student(view), answer, reduction="none") for view in views]
        return RegularizerLosses(torch.stack([(loss * certain).mean() for loss in losses]).mean())


def strong_view(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return patches (B, C, H, W, D) with other gain, offset and noise, and a box of each set to its mean."""
    count, sides = len(image), image.shape[2:]
    draws = (2 * torch.rand((2, count, 1, 1, 1, 1), generator=generator) - 1).to(image.device)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    changed = image * (1 + GAIN * draws[0]) + SHIFT * draws[1] + NOISE * noise
    for patch in changed:
        box = tuple(_interval(side, generator) for side in sides)
        patch[(slice(None), *box)] = patch.mean((1, 2, 3), keepdim=True)
    return changed


def _interval(side: int, generator: torch.Generator) -> slice:
    length = max(1, round(HOLE_SHARE * side))
    start = int(torch.randint(side - length + 1, (), generator=generator))
    return slice(start, start + length)
