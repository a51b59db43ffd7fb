"""Networks that a regularizer trains for itself. They stay at the site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from semisam_core.optimizers import descend


class OwnNetworks:
    """Networks by name, with the optimizer that trains them in this round.

    Their tensors are kept in the site's storage between rounds and are no part of what is agreed to travel. The
    optimizer starts afresh every round, as the specialist's does.

    Attributes:
        networks: the networks.

    Args:
        networks: name -> network, on the device that computes.
        optimizer: makes the optimizer of all of them together.
        rate: learning rate of step t.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        rate: Callable[[int], float],
    ) -> None:
        self.networks = nn.ModuleDict(dict(networks)).train()
        self._optimizer, self._rate = optimizer(self.networks), rate

    def step(self, loss: Tensor, t: int) -> None:
        """Train all networks by one step.

        Args:
            loss: a scalar, as `Losses.own`.
            t: step of the study.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        descend(self._optimizer, loss, self._rate(t), t)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of every tensor on the CPU, by ``<network>.<tensor>``."""
        return {name: value.detach().cpu().clone() for name, value in self.networks.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from tensors that `state` returned in an earlier round.

        Raises:
            RuntimeError: they are of other networks.
        """
        self.networks.load_state_dict(dict(state), strict=True)


def initial_seed(seed: int, name: str) -> int:
    """Return a seed below 2**31 for a network's initial weights, from the plan's seed and the network's name.

    It differs from the plan's own, so that no network begins as a copy of the specialist.
    """
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
