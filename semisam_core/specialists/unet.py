"""MONAI's residual 3D U-Net."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator
from torch import nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists.layers import GROUPS, Normalization, norm_layer

Channels = Annotated[int, Field(ge=1, le=4096)]
Stride = Annotated[int, Field(ge=1, le=8)]


class UNetArguments(StrictModel):
    """Arguments of the U-Net.

    Attributes:
        channels: features at each level.
        strides: stride between levels, one fewer than channels; a triple sets each axis separately.
        residual_units: residual units per level.
        normalization: `instance`, `group` or `batch`; only the last has running statistics.
    """

    channels: tuple[Channels, ...] = (16, 32, 64, 128)
    strides: tuple[Stride | tuple[Stride, Stride, Stride], ...] = (2, 2, 2)
    residual_units: int = Field(default=1, ge=0, le=8)
    normalization: Normalization = "instance"

    @model_validator(mode="after")
    def _levels(self) -> UNetArguments:
        if len(self.channels) < 2 or len(self.strides) != len(self.channels) - 1:
            raise ValueError("give at least two channels, and one stride fewer than channels")
        if self.normalization == "group" and any(c % GROUPS for c in self.channels):
            raise ValueError(f"group normalisation uses {GROUPS} groups, so channels must be multiples of {GROUPS}")
        if self.normalization == "group" and self.residual_units > 0:
            raise ValueError(
                "group normalisation accepts only residual_units: 0; with more, the output layer is normalised too"
            )
        return self

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of."""
        per_axis = [[s] * 3 if isinstance(s, int) else list(s) for s in self.strides]
        height, width, depth = (math.prod(stride[axis] for stride in per_axis) for axis in range(3))
        return height, width, depth


def build_unet(arguments: UNetArguments, in_channels: int, out_channels: int) -> nn.Module:
    """Build the network; activations are out of place so that per-sample gradients work."""
    from monai.networks.nets import UNet

    network: nn.Module = UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=arguments.channels,
        strides=arguments.strides,
        num_res_units=arguments.residual_units,
        norm=norm_layer(arguments.normalization),
        act=("LEAKYRELU", {"inplace": False}),
    )
    return network
