"""Bidirectional copy-paste (BCP; Bai et al., CVPR 2023): labeled and unlabeled patches pasted into each other."""

from __future__ import annotations

import torch
from torch import Tensor

from semisam_core.losses import supervised_loss
from semisam_core.regularizers.auxiliary_networks import AuxiliaryNetworks
from semisam_core.regularizers.base import RegularizerLosses, TrainingStep

BOX_SHARE = 2 / 3  # of each side of a patch, the side of the box that is pasted, as in the paper
UNLABELED_WEIGHT = 0.5  # of the teacher's part of a mixed patch against the expert's, as in the paper


class CopyPaste:
    """Cross-entropy + Dice on two mixed patches, with the expert's label in one part and the teacher's in the other.

        inward:  the labeled patch with a box of the unlabeled one;  outward: the other way round

    Each part has its own loss, and the teacher's counts half. The teacher predicts the unlabeled patch before it is
    mixed. A site without labels has nothing to paste, so the term does not apply; where labels mark only some of the
    classes, the expert's part uses the marginal loss.
    """

    auxiliary: AuxiliaryNetworks | None = None

    def losses(self, step: TrainingStep) -> RegularizerLosses:
        """Return the loss on both mixtures; see `Regularizer.losses`."""
        if step.labeled is None:
            return RegularizerLosses(None)
        known, unknown = step.labeled, step.unlabeled.image
        count = min(len(known.image), len(unknown))
        image, other = known.image[:count], unknown[:count]
        with torch.no_grad():
            answer = step.teacher(other).softmax(1).argmax(1)  # (B, H, W, D)
        box = box_mask(image.shape[2:], step.generator).to(image.device)
        losses = []
        for expert in (~box, box):  # where the labeled patch is seen: outside of the box, then inside
            logits = step.student(torch.where(expert, image, other))
            by_expert = _part(logits, known.label[:count], expert, known.annotated)
            losses.append(by_expert + UNLABELED_WEIGHT * _part(logits, answer, ~expert, None))
        return RegularizerLosses(torch.stack(losses).mean())


def box_mask(sides: torch.Size, generator: torch.Generator) -> Tensor:
    """Return (H, W, D) bool, True inside a random box of `BOX_SHARE` of each side."""
    mask = torch.zeros(tuple(sides), dtype=torch.bool)
    starts = []
    for side in sides:
        length = max(1, round(BOX_SHARE * side))
        start = int(torch.randint(side - length + 1, (), generator=generator))
        starts.append(slice(start, start + length))
    mask[tuple(starts)] = True
    return mask


def _part(logits: Tensor, label: Tensor, where: Tensor, annotated: tuple[int, ...] | None) -> Tensor:
    """Return the supervised loss over one part of the patches: (B, C, H, W, D), (B, H, W, D), (H, W, D)."""
    kept = where.reshape(-1)
    some = logits.flatten(2)[:, :, kept]  # (B, C, voxels)
    return supervised_loss(some[..., None, None], label.flatten(1)[:, kept][..., None, None], annotated)
