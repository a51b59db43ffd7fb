"""Networks that a regularizer trains beside the student. They stay at the site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from semisam_core.optimizers import descend


class AuxiliaryNetworks:
    """Networks by name and the optimizer that trains them in this round.

    Their tensors are kept in the site's storage between rounds and never leave it. The optimizer's state is reset every
    round, like the specialist's.

    Attributes:
        networks: the networks.

    Args:
        networks: name -> network, on the training device.
        optimizer: builds one optimizer for all of them.
        rate: learning rate at step t.
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
        """Take one optimizer step.

        Args:
            loss: a scalar, from `RegularizerLosses.auxiliary`.
            t: step of the study.

        Raises:
            FloatingPointError: the loss is not finite; the weights are unchanged.
        """
        descend(self._optimizer, loss, self._rate(t), t)

    def state(self) -> dict[str, Tensor]:
        """Return a CPU copy of every tensor, by ``<network>.<tensor>``."""
        return {name: value.detach().cpu().clone() for name, value in self.networks.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load tensors that `state` returned in an earlier round.

        Raises:
            RuntimeError: names or shapes differ from these networks'.
        """
        self.networks.load_state_dict(dict(state), strict=True)


def initial_seed(seed: int, name: str) -> int:
    """Return a seed below 2**31 for a network's initial weights, from the plan's seed and the network's name.

    It differs from the plan's seed, so that no auxiliary network starts as a copy of the specialist.
    """
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
