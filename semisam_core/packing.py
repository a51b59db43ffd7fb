"""Tensors as they travel: one vector for all of one dtype, since Flower sends every array by requests of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from semisam_core.contract import TensorSpec


def packed_spec(spec: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return name -> shape and dtype of the vectors in which agreed tensors travel.

    A vector is named after its dtype, such as `float32`. A single agreed tensor travels as it is, by its own name.
    """
    if len(spec) == 1:
        return dict(spec)
    counts: dict[torch.dtype, int] = {}
    for each in spec.values():
        counts[each.dtype] = counts.get(each.dtype, 0) + math.prod(each.shape)
    return {_name(dtype): TensorSpec((count,), dtype) for dtype, count in counts.items()}


def pack(tensors: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Return tensors as vectors of `packed_spec`, on the CPU.

    Args:
        tensors: those of the spec, of its shapes and dtypes.
        spec: the agreed tensors, in whose order their values follow each other.
    """
    if len(spec) == 1:
        return {name: tensors[name].detach().cpu().contiguous() for name in spec}
    parts: dict[torch.dtype, list[Tensor]] = {}
    for name, each in spec.items():
        parts.setdefault(each.dtype, []).append(tensors[name].detach().cpu().flatten())
    return {_name(dtype): torch.cat(values) for dtype, values in parts.items()}


def unpack(vectors: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors that vectors hold, each in memory of its own.

    Args:
        vectors: as `packed_spec` of the spec says.
        spec: the agreed tensors.
    """
    if len(spec) == 1:
        return dict(vectors)
    tensors, at = {}, dict.fromkeys(vectors, 0)
    for name, each in spec.items():
        vector, count = _name(each.dtype), math.prod(each.shape)
        tensors[name] = vectors[vector][at[vector] : at[vector] + count].reshape(each.shape).clone()
        at[vector] += count
    return tensors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
