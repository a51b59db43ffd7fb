"""MONAI's Swin UNETR (Hatamizadeh et al., BrainLes 2021): attention in shifted windows, convolutional decoder."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists.layers import norm_layer

DIVISOR = 32
WINDOW = 7
Blocks = Annotated[int, Field(ge=1, le=18)]


class SwinUNETRArguments(StrictModel):
    """Arguments of the Swin UNETR.

    Convolutions use instance norm and attention layer norm, neither with running statistics.

    Attributes:
        features: features at the first level, a multiple of 12; they double at each further level.
        blocks: attention blocks in each of the four stages.
        v2: a residual convolution block before each stage (SwinUNETR-V2, He et al., MICCAI 2023).
    """

    features: int = Field(default=24, ge=12, le=192, multiple_of=12)
    blocks: tuple[Blocks, Blocks, Blocks, Blocks] = (2, 2, 2, 2)
    v2: bool = False

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of: patch embedding and four mergings halve it."""
        return DIVISOR, DIVISOR, DIVISOR


def build_swinunetr(arguments: SwinUNETRArguments, in_channels: int, out_channels: int) -> nn.Module:
    """Build the network."""
    from monai.networks.nets import SwinUNETR

    network: nn.Module = SwinUNETR(
        in_channels=in_channels,
        out_channels=out_channels,
        depths=arguments.blocks,
        window_size=WINDOW,
        feature_size=arguments.features,
        norm_name=norm_layer("instance"),
        use_v2=arguments.v2,
    )
    _leave_buffers_out_of_the_state(network)
    return network


def _leave_buffers_out_of_the_state(network: nn.Module) -> None:
    """Keep the windows' position indices, which are constants, out of what is saved and sent."""
    for module in network.modules():
        for name, index in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, index, persistent=False)
