"""How embeddings are stored: 8-bit codes, block by block, their differences deflated."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 64 * 64  # values of one channel of SAM's feature maps
STEP = 0.125  # of a block's standard deviation; see benchmarks/embedding_codec.py
LEVELS = 127


@dataclass(frozen=True, eq=False)
class Coded:
    """An embedding as it is stored.

    Attributes:
        codes: (bytes,) uint8, deflated differences of neighbouring codes, modulo 256.
        steps: (blocks,) float32, value of one code in each block of `BLOCK` values.
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
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    steps = np.maximum(STEP * blocks.std(1, keepdims=True), np.abs(blocks).max(1, keepdims=True) / LEVELS)
    steps[~(steps > 0)] = 1.0  # a block of zeros
    codes = np.rint(blocks / steps).clip(-LEVELS, LEVELS).astype(np.int8).reshape(-1)[: flat.size]
    differences = np.diff(codes, prepend=np.int8(0))  # wrap around; so do their sums
    deflated = np.frombuffer(zlib.compress(differences.tobytes()), np.uint8).copy()
    return Coded(
        torch.from_numpy(deflated), torch.from_numpy(steps[:, 0]), torch.tensor(embedding.shape, dtype=torch.int64)
    )


def decoded(coded: Coded) -> Tensor:
    """Return the embedding, float32, each value within half a step.

    Raises:
        ValueError: the parts do not fit each other.
    """
    shape = [int(side) for side in coded.shape.tolist()]
    count = int(np.prod(shape, dtype=np.int64))
    deflated = zlib.decompressobj()
    try:
        raw = deflated.decompress(
            coded.codes.numpy().tobytes(), count
        )  # no more than was coded, whatever the file says
    except zlib.error as error:
        raise ValueError(f"codes cannot be inflated: {error}") from None
    if len(raw) != count or len(coded.steps) != -(-count // BLOCK):
        raise ValueError("codes, steps and shape do not fit each other")
    codes = np.cumsum(np.frombuffer(raw, np.int8), dtype=np.int8)
    steps = np.repeat(coded.steps.numpy(), BLOCK)[:count]
    return torch.from_numpy((codes * steps).reshape(shape))
