"""MONAI's DynUNet, the plain or residual U-Net of nnU-Net."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists.layers import GROUPS, Normalization, norm_layer, replace_layers

if TYPE_CHECKING:
    from monai.networks.blocks.dynunet_block import UnetResBlock

Channels = Annotated[int, Field(ge=1, le=4096)]
Stride = Annotated[int, Field(ge=1, le=4)]
Kernel = Literal[1, 3, 5, 7]


class DynUNetArguments(StrictModel):
    """Arguments of the DynUNet. The first level has stride 1, so the output has the patch's size.

    Attributes:
        channels: features at each level.
        strides: stride between levels, one fewer than channels; a triple sets each axis separately.
        kernels: convolution kernel of each level, as many as channels; a triple sets each axis separately.
        residual: residual blocks instead of plain ones.
        normalization: `instance`, `group` or `batch`; only the last has running statistics.
    """

    channels: tuple[Channels, ...] = Field(default=(32, 64, 128, 256), max_length=10)
    strides: tuple[Stride | tuple[Stride, Stride, Stride], ...] = (2, 2, 2)
    kernels: tuple[Kernel | tuple[Kernel, Kernel, Kernel], ...] = (3, 3, 3, 3)
    residual: bool = False
    normalization: Normalization = "instance"

    @model_validator(mode="after")
    def _levels(self) -> DynUNetArguments:
        levels = len(self.channels)
        if levels < 3 or len(self.strides) != levels - 1 or len(self.kernels) != levels:
            raise ValueError(
                f"give at least three channels, one stride fewer than channels and as many kernels as channels; "
                f"found {levels} channels, {len(self.strides)} strides, {len(self.kernels)} kernels"
            )
        for kernel, stride in zip(self.kernels[1:], self.strides, strict=True):
            if any(k < s - 1 for k, s in zip(_each_axis(kernel), _each_axis(stride), strict=True)):
                raise ValueError(f"the kernel {kernel} skips voxels at stride {stride}; it must be at least stride - 1")
        if self.residual and any(s > 2 for stride in self.strides for s in _each_axis(stride)):
            raise ValueError("residual: true accepts only strides of 1 and 2")
        if self.normalization == "group" and any(c % GROUPS for c in self.channels):
            raise ValueError(f"group normalisation uses {GROUPS} groups, so channels must be multiples of {GROUPS}")
        return self

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of."""
        height, width, depth = (math.prod(_each_axis(stride)[axis] for stride in self.strides) for axis in range(3))
        return height, width, depth


def build_dynunet(arguments: DynUNetArguments, in_channels: int, out_channels: int) -> nn.Module:
    """Build the network without deep supervision: one output, in training and in evaluation mode."""
    from monai.networks.blocks.dynunet_block import UnetResBlock
    from monai.networks.nets import DynUNet

    network = DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=arguments.kernels,
        strides=(1, *arguments.strides),
        upsample_kernel_size=arguments.strides,
        filters=arguments.channels,
        norm_name=norm_layer(arguments.normalization),
        act_name=("leakyrelu", {"inplace": False, "negative_slope": 0.01}),
        deep_supervision=False,
        res_block=arguments.residual,
    )
    # MONAI registers each block twice, by itself and within skip_layers; each shared tensor must have one name.
    once = nn.Sequential(OrderedDict(skip_layers=network.skip_layers, output_block=network.output_block))
    replace_layers(once, UnetResBlock, _OutOfPlaceBlock)
    return once


class _OutOfPlaceBlock(nn.Module):
    """MONAI's residual block with the sum out of place, so that per-sample gradients can be taken."""

    def __init__(self, block: UnetResBlock) -> None:
        super().__init__()
        self.conv1, self.norm1 = block.conv1, block.norm1
        self.conv2, self.norm2 = block.conv2, block.norm2
        self.lrelu = block.lrelu
        if block.downsample:
            self.conv3, self.norm3 = block.conv3, block.norm3
        self._projects = bool(block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        """Return act(F(x) + x), x projected where channels or size change."""
        inner = self.norm2(self.conv2(self.lrelu(self.norm1(self.conv1(x)))))
        result: Tensor = self.lrelu(inner + (self.norm3(self.conv3(x)) if self._projects else x))
        return result


def _each_axis(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else value
