"""The local optimizer, its learning-rate schedule and one clipped step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from semisam_core.plan_sections.training import OptimizerSettings

GRADIENT_NORM = 10.0


def build_optimizer(network: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer of one round; it starts without state from earlier rounds."""
    if settings.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=settings.learning_rate,
            momentum=0.9,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def learning_rate(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Return lr(t) = lr * (final + (1 - final) (1 - t/T)^0.9), polynomial decay over the whole study."""
    remaining = (1 - min(step, total_steps) / total_steps) ** 0.9
    share: float = settings.final_share + (1 - settings.final_share) * remaining
    return settings.learning_rate * share


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, t: int) -> None:
    """Take one optimizer step, with the gradient's norm clipped to `GRADIENT_NORM`.

    Args:
        optimizer: holds the parameters.
        loss: a scalar.
        rate: learning rate of this step.
        t: step of the study, for the error message.

    Raises:
        FloatingPointError: the loss is not finite; the parameters are unchanged.
    """
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss became {loss.item()} at step {t}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], GRADIENT_NORM)
    optimizer.step()
