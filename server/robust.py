"""Combination that a few dishonest sites cannot steer. No evidence weight has a say in how these rules judge.

All go block by block through the updates' files, so that memory depends neither on the number of sites nor on the
size of the specialist. `trim_mean` is Flower's. Flower's median is `numpy.median` inside a strategy that holds all
replies; so is its Krum, which moreover computes distances as ||x||^2 + ||y||^2 - 2 x.y in single precision, where the
distance of two updates is lost beside their norms. Both are used as oracles in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from numpy.typing import NDArray
from torch import Tensor

from server.updates import Update

BLOCK_VALUES = 2**20

Block = NDArray[np.float64]


def median(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Return the median of each coordinate (Yin et al., ICML 2018)."""
    return _by_coordinate(updates, lambda block: np.median(block, axis=0))


def trimmed_mean(updates: Sequence[Update], trim_share: float) -> dict[str, Tensor]:
    """Return the mean of each coordinate without the trim_share of values at each end (Yin et al., ICML 2018)."""
    return _by_coordinate(updates, lambda block: trim_mean(block, trim_share))


def by_krum(updates: Sequence[Update], malicious_sites: int) -> list[int]:
    """Return places of updates, the most central first (Krum; Blanchard et al., NeurIPS 2017).

    An update's score is the sum of squared distances to the n - f - 2 other updates that lie closest to it. Equal
    scores keep the order of the updates.

    Raises:
        ValueError: n < 2 f + 3, where the rule promises nothing.
    """
    count, closest = len(updates), len(updates) - malicious_sites - 2
    if count < 2 * malicious_sites + 3:
        raise ValueError(
            f"Krum with {malicious_sites} malicious sites needs {2 * malicious_sites + 3} updates, there are {count}"
        )
    distances = squared_distances(updates)
    scores = [float(np.sort(np.delete(row, k))[:closest].sum()) for k, row in enumerate(distances)]
    return sorted(range(count), key=lambda k: (scores[k], k))


def squared_distances(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return ||theta_i - theta_j||^2, (n, n), in double precision."""
    distances = np.zeros((len(updates), len(updates)))
    for name in updates[0].names:
        for block in _blocks(updates, name):
            for k, row in enumerate(block):
                distances[k, k + 1 :] += np.square(block[k + 1 :] - row).sum(1)
    return distances + distances.T


def _by_coordinate(updates: Sequence[Update], rule: Callable[[Block], Block]) -> dict[str, Tensor]:
    result = {}
    for name in updates[0].names:
        first = updates[0].tensor(name)
        combined = torch.cat([torch.from_numpy(np.asarray(rule(block))) for block in _blocks(updates, name)])
        whole = combined if first.is_floating_point() else combined.round()
        result[name] = whole.to(first.dtype).reshape(first.shape)
    return result


def _blocks(updates: Sequence[Update], name: str) -> Iterator[Block]:
    """Yield a tensor's values at all sites, (sites, up to `BLOCK_VALUES` / sites), piece by piece."""
    size, width = updates[0].tensor(name).numel(), max(1, BLOCK_VALUES // len(updates))
    for start in range(0, size, width):
        block = np.empty((len(updates), min(width, size - start)))
        for row, update in zip(block, updates, strict=True):
            row[:] = update.tensor(name).reshape(-1)[start : start + width].numpy()
        yield block
