"""A small network of dilated convolutions, without any downsampling."""

from pydantic import Field
from torch import nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists import SpecialistSpec, register_specialist


class DilatedArguments(StrictModel):
    """Arguments of the dilated network.

    Attributes:
        features: features of each layer.
        layers: number of layers; layer k sees voxels 2^k apart.
    """

    features: int = Field(default=16, ge=1, le=256)
    layers: int = Field(default=4, ge=1, le=6)

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of."""
        return 1, 1, 1


def build_dilated(arguments: DilatedArguments, in_channels: int, out_channels: int) -> nn.Module:
    """Build the network, from (B, C, H, W, D) to logits of the same size."""
    layers: list[nn.Module] = []
    for k in range(arguments.layers):
        inputs = arguments.features if k else in_channels
        layers.append(nn.Conv3d(inputs, arguments.features, 3, padding=2**k, dilation=2**k))
        layers += [nn.InstanceNorm3d(arguments.features, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Conv3d(arguments.features, out_channels, 1))


def register() -> None:
    """Let plans say `specialist: {name: dilated}`."""
    register_specialist("dilated", SpecialistSpec(DilatedArguments, build_dilated))
