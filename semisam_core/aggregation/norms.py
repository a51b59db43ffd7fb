"""How far an update is from the weights that its round began with."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def change_norm(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return ||theta_k - theta|| over the tensors of `reference`, in double precision, one tensor at a time."""
    squares = (float((weights[name].double() - start.double()).square().sum()) for name, start in reference.items())
    return math.sqrt(math.fsum(squares))
