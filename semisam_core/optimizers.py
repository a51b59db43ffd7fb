"""The local optimizer, its learning-rate schedule and one clipped step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from semisam_core.plan_sections.training import OptimizerSettings

GRADIENT_NORM = 10.0
MOMENTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def build_optimizer(network: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build an optimizer without moments."""
    if settings.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=settings.learning_rate,
            momentum=0.9,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def moments(optimizer: torch.optim.Optimizer, network: nn.Module, settings: OptimizerSettings) -> dict[str, Tensor]:
    """Return a CPU copy of the optimizer's moments by ``<parameter>.<moment>``, zeros where there are none yet.

    Args:
        optimizer: from `build_optimizer`.
        network: the network that it trains.
        settings: as for `build_optimizer`.
    """
    found = {}
    for name, parameter in network.named_parameters():
        state = optimizer.state.get(parameter, {})
        for moment in MOMENTS[settings.name]:
            none = torch.zeros(()) if moment == "step" else torch.zeros_like(parameter, device="cpu")
            found[f"{name}.{moment}"] = state.get(moment, none).detach().cpu().clone()
    return found


def load_moments(
    optimizer: torch.optim.Optimizer, network: nn.Module, settings: OptimizerSettings, kept: Mapping[str, Tensor]
) -> None:
    """Continue from moments that `moments` returned; a parameter's tensors are moved to its device.

    Raises:
        KeyError: a parameter's moments are missing.
    """
    state = {
        number: {moment: kept[f"{name}.{moment}"] for moment in MOMENTS[settings.name]}
        for number, (name, _) in enumerate(network.named_parameters())
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
