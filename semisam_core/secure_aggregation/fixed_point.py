"""An update as one vector of whole numbers modulo 2^64, which can be masked, summed and read back.

The vector is the specialist's weight, the feature head's weight, and the weighted change of every tensor from the
round's global weights, in units of 2^-32. With at most `MOST_SUMMED` sites and the largest bounds that a plan may set,
no sum overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semisam_core.contract import HEAD_PREFIX, TensorSpec
from semisam_core.plan_sections.aggregation import SecureAggregation
from semisam_core.secure_aggregation.masks import Vector
from semisam_core.secure_aggregation.weights import WholeWeights

UNIT = 2.0**-32
WEIGHTS = 2  # numbers before the tensors


@dataclass(frozen=True)
class Mean:
    """What a sum says.

    Attributes:
        weights: the sums of the sites' weights.
        tensors: the weighted mean of the sites' tensors; those of a head with weight 0 are the round's own.
    """

    weights: WholeWeights
    tensors: dict[str, Tensor]


def encode(
    update: Mapping[str, Tensor], reference: Mapping[str, Tensor], spec: Mapping[str, TensorSpec], weights: WholeWeights
) -> Vector:
    """Return an update as a vector.

    Args:
        update: the site's tensors, finite and within the plan's bound.
        reference: the round's global tensors.
        spec: the agreed tensors, whose order the vector follows.
        weights: of specialist and head.

    Returns:
        (2 + number of values,).
    """
    parts = [torch.tensor([weights.specialist, weights.head])]
    for name in spec:
        weight = weights.head if name.startswith(HEAD_PREFIX) else weights.specialist
        change = update[name].double() - reference[name].double()
        parts.append(torch.round(change * weight / UNIT).to(torch.int64).flatten())
    return torch.cat(parts).numpy().view(np.uint64)


def without_head(vector: Vector, spec: Mapping[str, TensorSpec]) -> Vector:
    """Return a vector whose head has weight 0."""
    size = sum(_size(agreed) for name, agreed in spec.items() if name.startswith(HEAD_PREFIX))
    kept = vector.copy()
    kept[1] = 0
    kept[len(kept) - size :] = 0
    return kept


def decode(
    total: Vector, reference: Mapping[str, Tensor], spec: Mapping[str, TensorSpec], sites: int, bound: SecureAggregation
) -> Mean:
    """Return the weighted mean from a sum of vectors.

    Args:
        total: the sum, without masks.
        reference: the round's global tensors.
        spec: the agreed tensors.
        sites: how many vectors were added.
        bound: the bounds of the plan, which every site has checked its own vector against.

    Raises:
        ValueError: no such vectors can have this sum, so a mask is left in it.
    """
    signed = total.view(np.int64)
    weights = WholeWeights(int(signed[0]), int(signed[1]))
    largest = int(sites * bound.maximum_weight * (bound.maximum_norm / UNIT + 1))
    fits = sites <= weights.specialist <= sites * bound.maximum_weight
    fits = fits and 0 <= weights.head <= sites * bound.maximum_weight
    if not fits or signed[WEIGHTS:].min(initial=0) < -largest or signed[WEIGHTS:].max(initial=0) > largest:
        raise ValueError("what is left after unmasking cannot be the sum of the sites' updates")
    tensors, at = {}, WEIGHTS
    for name, agreed in spec.items():
        part = torch.from_numpy(signed[at : at + _size(agreed)].copy()).reshape(agreed.shape)
        weight = weights.head if name.startswith(HEAD_PREFIX) else weights.specialist
        mean = reference[name].double() + part.double() * UNIT / max(weight, 1)
        tensors[name] = mean.to(agreed.dtype) if agreed.dtype.is_floating_point else mean.round().to(agreed.dtype)
        at += part.numel()
    return Mean(weights, tensors)


def vector_spec(spec: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return shape and dtype of the vector of these tensors."""
    return TensorSpec((WEIGHTS + sum(map(_size, spec.values())),), torch.int64)


def _size(agreed: TensorSpec) -> int:
    return int(np.prod(agreed.shape, dtype=np.int64))
