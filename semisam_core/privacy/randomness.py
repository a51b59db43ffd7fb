"""Where the noise and the draw of patients come from: the operating system, or for simulations a seed."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SUMMED = 4  # normal draws that make up one value of the noise


class Randomness(Protocol):
    """What a private step draws."""

    def normal(self, shape: torch.Size, deviation: float) -> Tensor:
        """Return independent draws from N(0, deviation^2), float64 on the CPU."""

    def chosen(self, count: int, rate: float) -> list[int]:
        """Return which of `count` patients take part, each with probability `rate`, independently of the others."""


class SecureRandomness:
    """The operating system's cryptographic generator (`os.urandom`), which nobody can predict or replay.

    Opacus's secure mode needs torchcsprng, which does not exist for current versions of torch; torch's own generators
    can be reconstructed from 32 bits of seed. Each value of the noise is half the sum of four normal draws by Box and
    Muller, as in Opacus's secure mode, so that the bits of a float do not give away what was added to it (Holohan and
    Braghin, ESORICS 2021).
    """

    def normal(self, shape: torch.Size, deviation: float) -> Tensor:
        """Return independent draws from N(0, deviation^2), float64 on the CPU."""
        pairs = SUMMED // 2
        radius, angle = _uniform(pairs * shape.numel()), _uniform(pairs * shape.numel())
        length = np.sqrt(-2 * np.log1p(-radius))
        both = length * (np.cos(2 * np.pi * angle) + np.sin(2 * np.pi * angle))  # the sum of two draws
        noise = both.reshape(pairs, -1).sum(0) / np.sqrt(SUMMED)
        return torch.from_numpy(deviation * noise).reshape(shape)

    def chosen(self, count: int, rate: float) -> list[int]:
        """Return which of `count` patients take part."""
        return [int(k) for k in np.flatnonzero(_uniform(count) < rate)]


class SeededRandomness:
    """Reproducible draws, for simulations and tests: whoever knows the seed can take the noise away.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        # Patients are drawn in the background, ahead of the noise.
        self._noise, self._draws = (torch.Generator().manual_seed(seed + k) for k in range(2))

    def normal(self, shape: torch.Size, deviation: float) -> Tensor:
        """Return independent draws from N(0, deviation^2), float64 on the CPU."""
        return deviation * torch.randn(shape, generator=self._noise, dtype=torch.float64)

    def chosen(self, count: int, rate: float) -> list[int]:
        """Return which of `count` patients take part."""
        draws = torch.rand(count, generator=self._draws, dtype=torch.float64)
        return [int(k) for k in (draws < rate).nonzero()]


def _uniform(count: int) -> NDArray[np.float64]:
    """Return draws from [0, 1), each a multiple of 2^-53."""
    bits = np.frombuffer(os.urandom(8 * count), dtype="<u8") >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
