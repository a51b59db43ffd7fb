"""Shared by the tests of this folder: randomness that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Known:
    """No noise, and the patients of each step as given; after the last, all of them.

    Attributes:
        deviations: what noise was asked for.
        rates: with what probability patients were to be drawn.
    """

    def __init__(self, chosen: Sequence[Sequence[int]] = ()) -> None:
        self._chosen: Iterator[Sequence[int]] = iter(chosen)
        self.deviations: list[float] = []
        self.rates: list[float] = []

    def normal(self, shape: torch.Size, deviation: float) -> Tensor:
        self.deviations.append(deviation)
        return torch.zeros(shape, dtype=torch.float64)

    def chosen(self, count: int, rate: float) -> list[int]:
        self.rates.append(rate)
        return list(next(self._chosen, range(count)))
