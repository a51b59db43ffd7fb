"""The three loss terms and schedules of SemiSAM+ (Zhang et al., Medical Image Analysis 2025), and FedProx's term."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_ALL_BUT_CLASS = (0, 2, 3, 4)  # of (B, K, H, W, D)


def supervised_loss(logits: Tensor, label: Tensor, annotated: Sequence[int] | None = None) -> Tensor:
    """Return 0.5 * (cross-entropy + Dice) on labeled patches.

    Where only some classes are annotated, an unlabeled voxel is background or one of the other classes. The loss is
    then the marginal loss of Shi et al. (Medical Image Analysis 2021): background and all classes that are not
    annotated are merged into one, "the rest", by adding their probabilities, and Dice is over annotated classes.

    Args:
        logits: (B, 1 + K, H, W, D), background first.
        label: (B, H, W, D) class indices 0..K; classes that are not annotated count as the rest.
        annotated: the annotated classes (from 1), at least one; None for all.

    Raises:
        ValueError: a class is not one of 1..K, or none is annotated.
    """
    from monai.losses import DiceLoss

    target = label.long()
    if (rest := _rest(logits.shape[1], annotated)) is not None:
        kept = [k for k in range(logits.shape[1]) if k not in rest]
        merged_index = torch.zeros(logits.shape[1], dtype=torch.long, device=logits.device)
        merged_index[kept] = torch.arange(1, 1 + len(kept), device=logits.device)
        logits = torch.cat([logits[:, rest].logsumexp(1, keepdim=True), logits[:, kept]], 1)
        target = merged_index[target]
    cross_entropy = functional.cross_entropy(logits, target)
    dice = DiceLoss(softmax=True, to_onehot_y=True, include_background=False)(logits, target[:, None])
    loss: Tensor = 0.5 * (cross_entropy + dice)
    return loss


def merge_rest(probability: Tensor, annotated: Sequence[int] | None) -> Tensor:
    """Add the probabilities of classes that are not annotated to the background's and set theirs to 0.

    Args:
        probability: (B, 1 + K, H, W, D), background first.
        annotated: the annotated classes (from 1), at least one; None for all.

    Returns:
        Probabilities of the same shape.

    Raises:
        ValueError: a class is not one of 1..K, or none is annotated.
    """
    if (rest := _rest(probability.shape[1], annotated)) is None:
        return probability
    channels = [torch.zeros_like(p) if k in rest else p for k, p in enumerate(probability.unbind(1))]
    return torch.stack([probability[:, rest].sum(1), *channels[1:]], 1)


def _rest(channels: int, annotated: Sequence[int] | None) -> list[int] | None:
    """Return the channels of background and of classes that are not annotated; None if all are annotated."""
    if annotated is None:
        return None
    if not annotated or not set(annotated) <= set(range(1, channels)):
        raise ValueError(f"annotated classes must be some of 1..{channels - 1}, found {list(annotated)}")
    rest = [k for k in range(channels) if k not in annotated]
    return rest if len(rest) > 1 else None


def consistency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over voxels and channels of (p_student - p_teacher)^2, without gradient for the teacher.

    Args:
        student: probabilities (B, 1 + K, H, W, D).
        teacher: probabilities of the same shape.
    """
    return ((student - teacher.detach()) ** 2).mean()


def confidence_aware_loss(student: Tensor, target: Tensor, uncertainty: Tensor, valid: Tensor) -> Tensor:
    """Return sum(exp(-U) (p - y)^2) / sum(exp(-U)) per class, averaged over the classes that have a target.

    U is a map: a single number would cancel. Voxels on which the generalist is uncertain count less. Neither y nor U
    gets a gradient.

    Args:
        student: the specialist's foreground probability p, (B, K, H, W, D).
        target: the pseudo-label y in [0, 1], same shape.
        uncertainty: U >= 0, same shape.
        valid: whether this sample has an accepted pseudo-label for this class, (B, K) bool.

    Returns:
        A scalar; 0, with a zero gradient, if nothing is valid.
    """
    weight = _confidence(uncertainty, valid)
    return _mean_over_classes(weight * (student - target.detach()) ** 2, weight, student, valid)


def confident_entropy_loss(student: Tensor, target: Tensor, uncertainty: Tensor, valid: Tensor) -> Tensor:
    """Return the binary cross-entropy of p against y, weighted by exp(-U), averaged over the classes with a target.

    Unlike that of the squared error, its gradient does not vanish where the student is sure and wrong. Arguments and
    result are those of `confidence_aware_loss`.
    """
    weight = _confidence(uncertainty, valid)
    entropy = functional.binary_cross_entropy(student.clamp(0, 1), target.detach(), reduction="none")
    return _mean_over_classes(weight * entropy, weight, student, valid)


def confident_dice_loss(student: Tensor, target: Tensor, uncertainty: Tensor, valid: Tensor) -> Tensor:
    """Return 1 - soft Dice of p and y, voxels weighted by exp(-U), averaged over the classes with a target.

    Arguments and result are those of `confidence_aware_loss`.
    """
    weight, y = _confidence(uncertainty, valid), target.detach()
    overlap, size = (weight * student * y).sum(_ALL_BUT_CLASS), (weight * (student + y)).sum(_ALL_BUT_CLASS)
    return _mean_of_present(1 - (2 * overlap + 1) / (size + 1), student, valid)


def _confidence(uncertainty: Tensor, valid: Tensor) -> Tensor:
    return torch.exp(-uncertainty.detach()) * valid[:, :, None, None, None]


def _mean_over_classes(weighted: Tensor, weight: Tensor, student: Tensor, valid: Tensor) -> Tensor:
    mass = weight.sum(_ALL_BUT_CLASS).clamp_min(1e-12)
    return _mean_of_present(weighted.sum(_ALL_BUT_CLASS) / mass, student, valid)


def _mean_of_present(per_class: Tensor, student: Tensor, valid: Tensor) -> Tensor:
    present = valid.any(0)
    return per_class[present].mean() if bool(present.any()) else student.sum() * 0.0


def consistency_weight(step: int, ramp_steps: float, weight: float) -> float:
    """Return lambda_c(t) = weight * exp(-5 (1 - min(t, t_ramp) / t_ramp)^2)."""
    if ramp_steps <= 0:
        return weight
    return weight * math.exp(-5 * (1 - min(step, ramp_steps) / ramp_steps) ** 2)


def generalist_weight(step: int, total_steps: int, weight: float, schedule: str, ramp_share: float = 1 / 3) -> float:
    """Return lambda_s(t) of one of three schedules.

    `decay`: weight * exp(-5 (t / T)^2), trusted early, less later (the paper's). `constant`: the weight. `ramp-up`:
    weight * exp(-5 (1 - min(t / (ramp_share T), 1))^2), since pseudo-labels get better as the study goes on.
    """
    if schedule == "ramp-up":
        return consistency_weight(step, ramp_share * total_steps, weight)
    if schedule == "constant":
        return weight
    return weight * math.exp(-5 * (step / total_steps) ** 2)


def teacher_decay(step: int, ceiling: float) -> float:
    """Return the EMA decay alpha = min(1 - 1 / (t + 1), ceiling), t counted from 0."""
    return min(1 - 1 / (step + 1), ceiling)


def proximal_loss(weights: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """Return 0.5 * ||w - w_global||^2, which FedProx weights by mu (Li et al., MLSys 2020).

    Args:
        weights: the specialist's shared parameters, at least one.
        start: the same parameters of the global specialist, without gradient.
    """
    squares = [(value - initial).square().sum() for value, initial in zip(weights, start, strict=True)]
    return 0.5 * torch.stack(squares).sum()
