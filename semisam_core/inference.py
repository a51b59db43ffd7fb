"""Whole-scan prediction and segmentation with the specialist alone: no generalist, no server."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from semisam_core.components import largest_component
from semisam_core.plan import Plan
from semisam_core.specialists import build_specialist


def new_specialist(plan: Plan) -> nn.Module:
    """Build the plan's specialist with initial weights that depend on the plan alone."""
    return build_specialist(
        plan.specialist.name,
        plan.specialist.arguments,
        len(plan.task.channels),
        len(plan.task.classes),
        plan.seed,
    )


def predict(
    network: nn.Module, image: Tensor, plan: Plan, device: torch.device, overlap: float | None = None
) -> Tensor:
    """Return class probabilities of a whole scan by a sliding window.

    Args:
        network: the specialist or its teacher; runs in evaluation mode and gets its own mode back.
        image: (C, H, W, D) on the plan's grid.
        plan: patch size.
        device: where to compute.
        overlap: share of a window that its neighbour covers, below 1; None for the plan's `evaluation.overlap`.

    Returns:
        (1 + K, H, W, D) float32 on the CPU; sums to one over the first axis.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            logits = sliding_window_inference(
                image[None].to(device),
                plan.data.patch,
                sw_batch_size=2,
                predictor=network,
                overlap=plan.evaluation.overlap if overlap is None else overlap,
                mode="gaussian",
            )
            return torch.as_tensor(logits)[0].float().softmax(0).cpu()
    finally:
        network.train(was_training)


def segmentation(probability: Tensor, plan: Plan) -> Tensor:
    """Return the segmentation of a prediction, as it is scored and shown.

    Each voxel gets its most probable class. A class that the plan calls `connected` keeps only its largest connected
    component, by number of voxels; the rest becomes background, even where another class is second. Voxels that share a
    face, an edge or a corner are connected, so that a thin diagonal part is not cut off. Among components of equal
    size, the first in array order stays.

    Args:
        probability: (1 + K, H, W, D) on the CPU, on any grid.
        plan: which of its K classes are connected.

    Returns:
        (H, W, D) int64 of class indices: 0 background, k the plan's k-th class.
    """
    return only_connected(probability.argmax(0), plan)


def only_connected(indices: Tensor, plan: Plan) -> Tensor:
    """Set everything but the largest component of each `connected` class to background, in place.

    Args:
        indices: (H, W, D) int64 of class indices, on the CPU.
        plan: which classes are connected.
    """
    boxes = ndimage.find_objects(indices.numpy(), max_label=len(plan.task.classes))
    for k, (target, box) in enumerate(zip(plan.task.classes, boxes, strict=True), start=1):
        if target.connected and box is not None:
            inside = indices[box]
            mask = inside == k
            inside[mask & ~torch.from_numpy(largest_component(mask.numpy()))] = 0
    return indices
