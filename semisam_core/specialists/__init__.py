"""The trainable networks by name. Only the specialist ever leaves a site.

MONAI is imported only when a network is built: the import takes seconds, and most commands only read the plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import nn

from semisam_core.configuration import StrictModel
from semisam_core.registry import add_entry
from semisam_core.specialists.dynunet import DynUNetArguments, build_dynunet
from semisam_core.specialists.layers import batch_norm_tensors
from semisam_core.specialists.memory import on_meta_device, training_step_memory
from semisam_core.specialists.segresnet import SegResNetArguments, build_segresnet
from semisam_core.specialists.swinunetr import SwinUNETRArguments, build_swinunetr
from semisam_core.specialists.unet import UNetArguments, build_unet
from semisam_core.specialists.vnet import INPUT_CHANNELS, VNetArguments, build_vnet

__all__ = [
    "SPECIALISTS",
    "SpecialistSpec",
    "batch_norm_tensors",
    "build_specialist",
    "check_specialist",
    "check_statistics",
    "memory_estimate",
    "outline_specialist",
    "parameter_count",
    "patch_divisor",
    "register_specialist",
]


class NetworkArguments(Protocol):
    """What every argument model knows before its network is built."""

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of; at that size the deepest level has one voxel."""


@dataclass(frozen=True)
class SpecialistSpec:
    """A registry entry: what is known about a network before it is built.

    Attributes:
        arguments: model of its arguments, which also gives the divisor of patches.
        build: takes arguments, input and output channels; returns a network whose logits have the patch's size.
        input_channels: accepted numbers of input channels; None for any.
    """

    arguments: type[StrictModel]
    build: Callable[[Any, int, int], nn.Module]
    input_channels: tuple[int, ...] | None = None


SPECIALISTS: dict[str, SpecialistSpec] = {
    "dynunet": SpecialistSpec(DynUNetArguments, build_dynunet),
    "segresnet": SpecialistSpec(SegResNetArguments, build_segresnet),
    "swinunetr": SpecialistSpec(SwinUNETRArguments, build_swinunetr),
    "unet": SpecialistSpec(UNetArguments, build_unet),
    "vnet": SpecialistSpec(VNetArguments, build_vnet, INPUT_CHANNELS),
}


def register_specialist(name: str, spec: SpecialistSpec) -> None:
    """Add a network to the registry of this process.

    Raises:
        ValueError: another network has the name.
    """
    add_entry(SPECIALISTS, "specialist", name, spec)


def check_specialist(name: str, arguments: Mapping[str, Any], patch: tuple[int, int, int], channels: int) -> None:
    """Check, without building it, that the network exists and takes these arguments, channels and patches.

    Args:
        name: name in the registry.
        arguments: the network's arguments, as in the plan.
        patch: (H, W, D) in voxels.
        channels: input channels.

    Raises:
        ValueError: a sentence that names what is accepted.
    """
    spec = _spec(name)
    divisors = patch_divisor(name, arguments)
    if spec.input_channels is not None and channels not in spec.input_channels:
        accepted = ", ".join(str(each) for each in spec.input_channels)
        raise ValueError(f"task.channels has {channels} entries; the specialist {name} accepts {accepted}")
    for axis, (side, divisor) in enumerate(zip(patch, divisors, strict=True)):
        if side % divisor:
            accepted = ", ".join(str(divisor * (max(1, side // divisor) + k)) for k in (0, 1))
            raise ValueError(
                f"data.patch[{axis}] = {side} does not fit the specialist {name}: "
                f"it must be a multiple of {divisor}, for example {accepted}"
            )
    if tuple(patch) == divisors:
        raise ValueError(
            f"data.patch = {list(patch)} leaves a single voxel at the deepest level of the specialist {name}, which "
            f"cannot be normalised: make a side longer, for example {[2 * patch[0], *patch[1:]]}"
        )


def check_statistics(name: str, arguments: Mapping[str, Any], statistics: str | None) -> None:
    """Check that a plan has `specialist.statistics` if and only if the network keeps running statistics.

    Raises:
        ValueError: a sentence that names what is accepted.
    """
    has_any = getattr(_parse(name, arguments), "normalization", None) == "batch"
    if has_any and statistics is None:
        raise ValueError(
            "specialist.statistics is missing; with normalization: batch, set it to shared (batch-norm layers are "
            "averaged like all other tensors) or local (they stay at each site)"
        )
    if not has_any and statistics is not None:
        raise ValueError(
            f"specialist.statistics = {statistics}: this {name} keeps no running statistics; "
            "remove the key, or choose normalization: batch if the network accepts it"
        )


def patch_divisor(name: str, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what each side of a patch must be a multiple of.

    Raises:
        ValueError: the network is unknown or does not take these arguments.
    """
    parsed: Any = _parse(name, arguments)
    network_arguments: NetworkArguments = parsed
    return network_arguments.divisor()


def build_specialist(name: str, arguments: Mapping[str, Any], in_channels: int, classes: int, seed: int) -> nn.Module:
    """Build a network whose initial weights depend only on the seed.

    Args:
        name: name in the registry.
        arguments: the network's arguments, as in the plan.
        in_channels: input channels.
        classes: foreground classes; the output has one more channel (background first).
        seed: seed of the initial weights.

    Returns:
        A network from (B, C, H, W, D) to logits (B, 1 + K, H, W, D), in training and in evaluation mode.

    Raises:
        ValueError: the network is unknown or does not take these arguments.
    """
    spec, parsed = _spec(name), _parse(name, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.build(parsed, in_channels, classes + 1)


def outline_specialist(name: str, arguments: Mapping[str, Any], in_channels: int, classes: int) -> nn.Module:
    """Build a network on the meta device: names, shapes and dtypes, no content. Arguments as `build_specialist`.

    Raises:
        ValueError: the network is unknown or does not take these arguments.
    """
    with on_meta_device():
        return build_specialist(name, arguments, in_channels, classes, 0)


def memory_estimate(
    name: str,
    arguments: Mapping[str, Any],
    in_channels: int,
    classes: int,
    patch: tuple[int, int, int],
    batch: int,
) -> int:
    """Return the peak memory of one training step in bytes: weights, gradients, AdamW's state, teacher, activations.

    See `training_step_memory` for what is not counted. The estimate itself allocates nothing of that size.

    Args:
        name: name in the registry.
        arguments: the network's arguments, as in the plan.
        in_channels: input channels.
        classes: foreground classes.
        patch: (H, W, D) in voxels.
        batch: patches of one step, labeled and unlabeled together: the activations of both are alive at once.

    Raises:
        ValueError: the network is unknown, or does not take these arguments, channels or patches.
    """
    check_specialist(name, arguments, patch, in_channels)
    return training_step_memory(
        lambda: build_specialist(name, arguments, in_channels, classes, 0), in_channels, patch, batch
    ).peak


def parameter_count(network: nn.Module) -> int:
    """Return the number of trainable numbers."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def _spec(name: str) -> SpecialistSpec:
    if name not in SPECIALISTS:
        raise ValueError(f"unknown specialist {name!r}; accepted: {', '.join(sorted(SPECIALISTS))}")
    return SPECIALISTS[name]


def _parse(name: str, arguments: Mapping[str, Any]) -> StrictModel:
    model = _spec(name).arguments
    try:
        # Through JSON, like `configuration.parse`: lists pass for tuples, but "3" not for 3 and true not for 1.
        return model.model_validate_json(json.dumps(dict(arguments), default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(all)"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"specialist.arguments.{key}: {message}; {name} takes {', '.join(model.model_fields)}"
        ) from None
