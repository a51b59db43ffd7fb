"""How embeddings are stored: 8-bit codes, or 16 where extremes need them, their differences deflated."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64 * 64  # values of one channel of SAM's feature maps; larger channels, and what has none, are cut
STEP = 0.125  # of a block's standard deviation; see benchmarks/embedding_store.py
FINE_STEP = 0.25  # of a block's typical difference between neighbours, where a few extremes would crush the rest
COARSEST = 1.5  # typical differences that a step may span; LiteMedSAM's steps span at most 1.3
NARROW, WIDE = 127, 32767  # largest code in 8 and 16 bits


@dataclass(frozen=True, eq=False)
class Coded:
    """An embedding as it is stored.

    Attributes:
        codes: (bytes,) uint8, deflated differences of neighbouring codes, modulo 2^8 or 2^16.
        steps: (blocks,) float32, value of one code in each block: a channel, the first dimension's, or a part of one.
        shape: (dimensions,) int64.
    """

    codes: Tensor
    steps: Tensor
    shape: Tensor


def encoded(embedding: Tensor) -> Coded | None:
    """Code an embedding of any shape; None if it cannot be, since a value is not finite."""
    flat = embedding.detach().float().cpu().reshape(-1).numpy()
    if not np.isfinite(flat).all():
        return None
    block = _block(embedding.shape)
    blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    steps = _steps(blocks)
    codes = np.rint(blocks / steps[:, None]).reshape(-1)[: flat.size]
    kind = np.int8 if np.abs(codes).max(initial=0) <= NARROW else np.int16
    differences = np.diff(codes.astype(kind), prepend=kind(0))  # wrap around; so do their sums
    planes = differences.view(np.uint8).reshape(flat.size, -1).T  # low bytes, then high ones, which hardly vary
    deflated = np.frombuffer(zlib.compress(planes.tobytes()), np.uint8).copy()
    return Coded(torch.from_numpy(deflated), torch.from_numpy(steps), torch.tensor(embedding.shape, dtype=torch.int64))


def _steps(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = np.abs(blocks).max(1)
    steps = np.maximum(STEP * blocks.std(1), largest / NARROW)
    typical = _typical_differences(blocks)
    steps = np.where(steps > COARSEST * typical, np.maximum(FINE_STEP * typical, largest / WIDE), steps)
    steps[~(steps > 0)] = 1.0  # a block of zeros
    found: NDArray[np.float32] = steps.astype(np.float32)
    return found


def _typical_differences(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each block's median difference between neighbours that differ; infinite where none do."""
    sizes = np.sort(np.abs(np.diff(blocks, axis=1, append=blocks[:, -1:])), axis=1)
    equal = (sizes == 0).sum(1)
    middle = np.minimum(equal + (blocks.shape[1] - equal) // 2, blocks.shape[1] - 1)
    found: NDArray[np.float32] = np.take_along_axis(sizes, middle[:, None], axis=1)[:, 0]
    return np.where(found > 0, found, np.float32(np.inf))


def decoded(coded: Coded) -> Tensor:
    """Return the embedding, float32, each value within half a step.

    Raises:
        ValueError: the parts do not fit each other.
    """
    shape = [int(side) for side in coded.shape.tolist()]
    count = int(np.prod(shape, dtype=np.int64))
    deflated = zlib.decompressobj()
    try:
        # No more than the shape allows, whatever the codes say; 0 would mean without a bound.
        raw = deflated.decompress(coded.codes.numpy().tobytes(), max(1, 2 * count))
    except zlib.error as error:
        raise ValueError(f"codes cannot be inflated: {error}") from None
    block = _block(shape)
    if len(raw) not in (count, 2 * count) or len(coded.steps) != -(-count // block):
        raise ValueError("codes, steps and shape do not fit each other")
    kind = np.int8 if len(raw) == count else np.int16
    planes = np.frombuffer(raw, np.uint8).reshape(np.dtype(kind).itemsize, count).T
    codes = np.cumsum(np.ascontiguousarray(planes).view(kind).reshape(-1), dtype=kind)
    steps = np.repeat(coded.steps.numpy(), block)[:count]
    return torch.from_numpy((codes * steps).astype(np.float32).reshape(shape))


def _block(shape: Sequence[int]) -> int:
    channel = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else BLOCK
    return channel if 0 < channel <= BLOCK else BLOCK
