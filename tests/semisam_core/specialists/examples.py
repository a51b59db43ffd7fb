"""Small instances of every specialist, shared by the tests in this folder."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn


class Example(NamedTuple):
    """A network small enough for a test, and a small patch that it takes."""

    name: str
    arguments: dict[str, Any]
    divisor: tuple[int, int, int]

    @property
    def patch(self) -> tuple[int, int, int]:
        height, width, depth = self.divisor
        return max(8, 2 * height), max(8, width), max(8, depth)


UNET: dict[str, Any] = {"channels": [6, 8, 8], "strides": [2, 2], "residual_units": 1}
DYNUNET: dict[str, Any] = {"channels": [6, 8, 12], "strides": [2, 2], "kernels": [3, 3, 3]}
FLAT: dict[str, Any] = {
    "channels": [6, 8, 12],
    "strides": [[2, 2, 1], [3, 2, 2]],
    "kernels": [[3, 3, 1], [3, 3, 1], 3],
}
SEGRESNET: dict[str, Any] = {"channels": 6, "blocks_down": [1, 2, 1], "blocks_up": [1, 1]}
SWIN: dict[str, Any] = {"features": 12, "blocks": [1, 1, 2, 1]}

EXAMPLES = {
    "unet": Example("unet", UNET, (4, 4, 4)),
    "dynunet": Example("dynunet", DYNUNET, (4, 4, 4)),
    "flat dynunet": Example("dynunet", FLAT, (6, 4, 2)),
    "residual dynunet": Example("dynunet", DYNUNET | {"residual": True}, (4, 4, 4)),
    "vnet": Example("vnet", {}, (16, 16, 16)),
    "vnet with prelu": Example("vnet", {"activation": "prelu"}, (16, 16, 16)),
    "segresnet": Example("segresnet", SEGRESNET, (4, 4, 4)),
    "trilinear segresnet": Example("segresnet", SEGRESNET | {"upsampling": "trilinear"}, (4, 4, 4)),
    "swinunetr": Example("swinunetr", SWIN, (32, 32, 32)),
    "swinunetr v2": Example("swinunetr", SWIN | {"v2": True}, (32, 32, 32)),
}
GROUPED = {
    "unet": Example("unet", UNET | {"channels": [8, 8, 16], "residual_units": 0, "normalization": "group"}, (4, 4, 4)),
    "dynunet": Example("dynunet", DYNUNET | {"channels": [8, 8, 16], "normalization": "group"}, (4, 4, 4)),
    "segresnet": Example("segresnet", SEGRESNET | {"channels": 8, "normalization": "group"}, (4, 4, 4)),
}
BATCHED = {
    name: EXAMPLES[name]._replace(arguments=EXAMPLES[name].arguments | {"normalization": "batch"})
    for name in ("unet", "dynunet", "vnet", "segresnet")
}

EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
EVERY_GROUPED = pytest.mark.parametrize("example", GROUPED.values(), ids=[f"{name} in groups" for name in GROUPED])
EVERY_BATCHED = pytest.mark.parametrize(
    "example", BATCHED.values(), ids=[f"{name} with batch norm" for name in BATCHED]
)


def patches(example: Example, batch: int = 1, channels: int = 1, seed: int = 0) -> Tensor:
    """Return random patches (B, C, H, W, D)."""
    return torch.randn((batch, channels, *example.patch), generator=torch.Generator().manual_seed(seed))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two networks hold the same tensors bit by bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
