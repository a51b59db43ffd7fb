"""Which networks keep the patches of a batch apart, by Opacus's validators."""

from __future__ import annotations

from torch import nn


def check_network(network: nn.Module) -> None:
    """Check that no layer mixes patches of a batch or keeps statistics of the scans that it has seen.

    Args:
        network: in training mode.

    Raises:
        ValueError: a sentence for each kind of layer that does, with Opacus's advice.
    """
    from opacus.validators import ModuleValidator

    mistakes = sorted({" ".join(str(each).split()) for each in ModuleValidator.validate(network)})
    if mistakes:
        raise ValueError("the specialist cannot be trained with differential privacy: " + " ".join(mistakes))
