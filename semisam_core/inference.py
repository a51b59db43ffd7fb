"""Prediction with the specialist alone: no generalist, no server."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

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
