"""Prediction and segmentation with the specialist alone: no generalist, no server."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from semisam_core.components import largest_component
from semisam_core.plan import Plan
from semisam_core.specialists import build_specialist


def new_specialist(plan: Plan) -> nn.Module:
    """Build the plan's specialist with its initial weights, which depend on the plan alone."""
    return build_specialist(
        plan.specialist.name,
        plan.specialist.arguments,
        len(plan.task.channels),
        len(plan.task.classes),
        plan.seed,
    )


def predict(network: nn.Module, image: Tensor, plan: Plan, device: torch.device) -> Tensor:
    """Return class probabilities of a whole scan by a sliding window.

    Args:
        network: the specialist or its teacher; put in evaluation mode here and back afterwards.
        image: (C, H, W, D) on the plan's grid.
        plan: patch size and window overlap.
        device: where to compute.

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
                overlap=plan.evaluation.overlap,
                mode="gaussian",
            )
            return torch.as_tensor(logits)[0].float().softmax(0).cpu()
    finally:
        network.train(was_training)


def segmentation(probability: Tensor, plan: Plan) -> Tensor:
    """Return what a prediction says of each voxel, which is what is scored and shown.

    Each voxel has its most probable class. Of a class that the plan calls `connected` only the largest connected
    component stays, by number of voxels, and the rest becomes background, also where another class comes second.
    Voxels are connected by faces, edges and corners, so that a thin part is not torn off where it runs diagonally. Of
    components of equal size the one stays that comes first in the order of the array.

    Args:
        probability: (1 + K, H, W, D) on the CPU, on any grid: that of the plan or the scan's own.
        plan: which of its K classes are connected.

    Returns:
        (H, W, D) int64 of class indices: 0 background, k the plan's k-th class.
    """
    indices = probability.argmax(0)
    boxes = ndimage.find_objects(indices.numpy(), max_label=len(plan.task.classes))
    for k, (target, box) in enumerate(zip(plan.task.classes, boxes, strict=True), start=1):
        if target.connected and box is not None:
            inside = indices[box]
            mask = inside == k
            inside[mask & ~torch.from_numpy(largest_component(mask.numpy()))] = 0
    return indices
