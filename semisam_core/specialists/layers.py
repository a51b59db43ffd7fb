"""What the networks have in common: normalisation by name, and layers that are exchanged after MONAI has built them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import nn

Normalization = Literal["instance", "group", "batch"]
GROUPS = 8

Layer = TypeVar("Layer", bound=nn.Module)


def norm_layer(name: Normalization) -> tuple[str, dict[str, Any]]:
    """Return MONAI's name and arguments of a normalisation; every kind has a learned scale and shift a channel."""
    if name == "batch":
        return "BATCH", {"affine": True}
    if name == "group":
        return "GROUP", {"num_groups": GROUPS, "affine": True}
    return "INSTANCE", {"affine": True}


def replace_layers(network: nn.Module, kind: type[Layer], make: Callable[[Layer], nn.Module]) -> None:
    """Put another layer in the place of each layer of one kind; names in the state stay as they are.

    Args:
        network: changed in place.
        kind: the class of the layers to replace.
        make: given the layer that goes, returns the one that comes.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                module.register_module(name, make(child))


def batch_norm_tensors(network: nn.Module) -> frozenset[str]:
    """Return the names, in the network's state, of everything that its batch-norm layers hold."""
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for name in layer.state_dict()
    )
