"""Shared by the networks: normalisation layers by name, and replacing layers that MONAI built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import nn

Normalization = Literal["instance", "group", "batch"]
GROUPS = 8

Layer = TypeVar("Layer", bound=nn.Module)


def norm_layer(name: Normalization) -> tuple[str, dict[str, Any]]:
    """Return MONAI's name and arguments for a normalisation, always with a learned scale and shift per channel."""
    if name == "batch":
        return "BATCH", {"affine": True}
    if name == "group":
        return "GROUP", {"num_groups": GROUPS, "affine": True}
    return "INSTANCE", {"affine": True}


def replace_layers(network: nn.Module, kind: type[Layer], make: Callable[[Layer], nn.Module]) -> None:
    """Replace every layer of one kind; names in the state dict stay the same.

    Args:
        network: changed in place.
        kind: the class of the layers to replace.
        make: returns the replacement for a layer.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                module.register_module(name, make(child))


def batch_norm_tensors(network: nn.Module) -> frozenset[str]:
    """Return the names in the state dict of all parameters and buffers of batch-norm layers."""
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for name in layer.state_dict()
    )
