"""MONAI's SegResNet (Myronenko, BrainLes 2018): a deep residual encoder and a thin decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists.layers import GROUPS, Normalization, norm_layer, replace_layers

if TYPE_CHECKING:
    from monai.networks.blocks.segresnet_block import ResBlock

Blocks = Annotated[int, Field(ge=1, le=16)]


class SegResNetArguments(StrictModel):
    """Arguments of the SegResNet.

    Attributes:
        channels: features at the first level; they double at each further level.
        blocks_down: residual blocks at each level of the encoder.
        blocks_up: residual blocks at each level of the decoder, one entry fewer.
        upsampling: `transposed` convolutions or `trilinear`, whose gradient on a GPU is summed in no fixed order, so
            that runs are not reproducible bit by bit.
        normalization: `instance`, `group` or `batch`; only the last has running statistics.
    """

    channels: int = Field(default=16, ge=1, le=512)
    blocks_down: tuple[Blocks, ...] = Field(default=(1, 2, 2, 4), min_length=2, max_length=7)
    blocks_up: tuple[Blocks, ...] = (1, 1, 1)
    upsampling: Literal["transposed", "trilinear"] = "transposed"
    normalization: Normalization = "instance"

    @model_validator(mode="after")
    def _levels(self) -> SegResNetArguments:
        if len(self.blocks_up) != len(self.blocks_down) - 1:
            raise ValueError("blocks_up must have one entry fewer than blocks_down")
        if self.normalization == "group" and self.channels % GROUPS:
            raise ValueError(f"group normalisation uses {GROUPS} groups, so channels must be a multiple of {GROUPS}")
        return self

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of."""
        side = 1 << (len(self.blocks_down) - 1)
        return side, side, side


def build_segresnet(arguments: SegResNetArguments, in_channels: int, out_channels: int) -> nn.Module:
    """Build the network; activations and sums are out of place so that per-sample gradients work."""
    from monai.networks.blocks.segresnet_block import ResBlock
    from monai.networks.nets import SegResNet

    network: nn.Module = SegResNet(
        spatial_dims=3,
        init_filters=arguments.channels,
        in_channels=in_channels,
        out_channels=out_channels,
        act=("RELU", {"inplace": False}),
        norm=norm_layer(arguments.normalization),
        blocks_down=arguments.blocks_down,
        blocks_up=arguments.blocks_up,
        upsample_mode="deconv" if arguments.upsampling == "transposed" else "nontrainable",
    )
    replace_layers(network, ResBlock, _OutOfPlaceBlock)
    return network


class _OutOfPlaceBlock(nn.Module):
    """MONAI's pre-activation residual block with the sum out of place."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.act = block.act

    def forward(self, x: Tensor) -> Tensor:
        """Return F(x) + x."""
        inner = self.conv1(self.act(self.norm1(x)))
        result: Tensor = self.conv2(self.act(self.norm2(inner))) + x
        return result
