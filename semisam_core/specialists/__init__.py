"""The trainable networks, by name. The specialist is the only thing that is ever sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists.unet import UNetArguments, build_unet


@dataclass(frozen=True)
class SpecialistSpec:
    """What the plan needs to know of a network before building it."""

    arguments: type[StrictModel]
    build: Callable[[Any, int, int], nn.Module]
    divisor: Callable[[Any], tuple[int, int, int]]


SPECIALISTS: Mapping[str, SpecialistSpec] = {
    "unet": SpecialistSpec(UNetArguments, build_unet, UNetArguments.divisor),
}


def check_specialist(name: str, arguments: Mapping[str, Any], patch: tuple[int, int, int]) -> None:
    """Check that the network exists, takes these arguments and divides this patch.

    Raises:
        ValueError: a sentence that names what is accepted.
    """
    spec, parsed = _resolve(name, arguments)
    for axis, (side, divisor) in enumerate(zip(patch, spec.divisor(parsed), strict=True)):
        if side % divisor:
            accepted = ", ".join(str(divisor * (max(1, side // divisor) + k)) for k in (0, 1))
            raise ValueError(
                f"data.patch[{axis}] = {side} cannot be divided by the specialist {name}: "
                f"multiples of {divisor} are accepted, for example {accepted}"
            )


def build_specialist(name: str, arguments: Mapping[str, Any], in_channels: int, classes: int, seed: int) -> nn.Module:
    """Build a network whose initial weights depend on the seed alone.

    Args:
        name: name in the registry.
        arguments: the network's own arguments, as in the plan.
        in_channels: input channels.
        classes: foreground classes; the output has one more channel (background first).
        seed: seed of the initial weights.
    """
    spec, parsed = _resolve(name, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.build(parsed, in_channels, classes + 1)


def parameter_count(network: nn.Module) -> int:
    """Return the number of trainable numbers."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def _resolve(name: str, arguments: Mapping[str, Any]) -> tuple[SpecialistSpec, StrictModel]:
    if name not in SPECIALISTS:
        raise ValueError(f"unknown specialist {name!r}; accepted: {', '.join(sorted(SPECIALISTS))}")
    spec = SPECIALISTS[name]
    try:
        return spec, spec.arguments.model_validate(dict(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(all)"
        raise ValueError(
            f"specialist.arguments.{key}: {first['msg']}; {name} takes {', '.join(spec.arguments.model_fields)}"
        ) from None
