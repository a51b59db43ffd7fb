"""MONAI's V-Net (Milletari et al., 3DV 2016), the usual network of the left-atrium benchmark."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from semisam_core.configuration import StrictModel
from semisam_core.specialists.layers import replace_layers

DIVISOR = 16
# The first layer adds the image, repeated along the channels, to its 16 features.
INPUT_CHANNELS = (1, 2, 4, 8)


class VNetArguments(StrictModel):
    """Arguments of the V-Net; depth and width are fixed. No dropout: it draws from the global random state.

    Attributes:
        activation: `elu`, or `prelu` as in the paper (a learned slope per channel).
        normalization: `instance` or `batch`; only the latter has running statistics. MONAI's default is batch.
    """

    activation: Literal["elu", "prelu"] = "elu"
    normalization: Literal["instance", "batch"] = "instance"

    def divisor(self) -> tuple[int, int, int]:
        """Return what each side of a patch must be a multiple of: four levels of stride 2."""
        return DIVISOR, DIVISOR, DIVISOR


def build_vnet(arguments: VNetArguments, in_channels: int, out_channels: int) -> nn.Module:
    """Build the network, with MONAI's batch norm replaced by instance norm unless the plan asks for batch."""
    from monai.networks.nets import VNet

    activation: str | tuple[str, dict[str, Any]] = "prelu"
    if arguments.activation == "elu":
        activation = ("elu", {"inplace": False})
    network: nn.Module = VNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        act=activation,
        dropout_prob_down=None,
        dropout_prob_up=(None, 0.0),
    )
    replace_layers(network, nn.Dropout3d, lambda _: nn.Identity())  # draws random numbers even at probability 0
    if arguments.normalization == "instance":
        replace_layers(network, nn.BatchNorm3d, lambda layer: nn.InstanceNorm3d(layer.num_features, affine=True))
    return network
