"""Rules that combine each coordinate on its own, reading the updates block by block.

Memory depends neither on the number of sites nor on the size of the specialist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semisam_core.aggregation.base import Update

BLOCK_VALUES = 2**20

Block = NDArray[np.float64]


def by_coordinate(updates: Sequence[Update], rule: Callable[[Block], Block]) -> dict[str, Tensor]:
    """Apply a rule from (sites, values) to (values,) to all tensors."""
    result = {}
    for name in updates[0].names:
        first = updates[0].tensor(name)
        combined = torch.cat([torch.from_numpy(np.asarray(rule(block))) for block in blocks(updates, name)])
        whole = combined if first.is_floating_point() else combined.round()
        result[name] = whole.to(first.dtype).reshape(first.shape)
    return result


def blocks(updates: Sequence[Update], name: str) -> Iterator[Block]:
    """Yield a tensor's values of all sites in blocks of shape (sites, up to `BLOCK_VALUES` / sites)."""
    size, width = updates[0].tensor(name).numel(), max(1, BLOCK_VALUES // len(updates))
    for start in range(0, size, width):
        block = np.empty((len(updates), min(width, size - start)))
        for row, update in zip(block, updates, strict=True):
            row[:] = update.tensor(name).reshape(-1)[start : start + width].numpy()
        yield block
