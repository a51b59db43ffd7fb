"""Groups of cases that are the same scan, or nearly, and cases that lie apart from the rest."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 8
"""Cases below which no outlier is looked for: a median of fewer says little."""
FARTHEST = 6.0
"""Modified z-score beyond which a case is an outlier. Iglewicz and Hoaglin (1993) recommend 3.5 for the normal
distribution; ratios of volumes and voxel sizes have longer tails."""
NEAR = 0.999
"""Correlation of miniatures from which two scans may be one. The closest two patients of 48 left-atrium scans reach
0.966, those of 160 hippocampus scans 0.919."""


def sharing(keys: Mapping[str, Iterable[Hashable]]) -> list[list[str]]:
    """Return groups of names of which each shares at least one key with another of its group, in order of names."""
    parent = {name: name for name in keys}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[Hashable, str] = {}
    for name in sorted(keys):
        for key in keys[name]:
            parent[root(name)] = root(first.setdefault(key, name))
    groups: dict[str, list[str]] = {}
    for name in sorted(keys):
        groups.setdefault(root(name), []).append(name)
    return sorted(group for group in groups.values() if len(group) > 1)


def near_pairs(names: Sequence[str], miniatures: Sequence[NDArray[np.float32]]) -> list[tuple[str, str, float]]:
    """Return pairs of scans whose miniatures correlate with at least `NEAR`, with the correlation.

    Args:
        names: of the scans.
        miniatures: (512,) each, of mean 0 and length 1; zeros correlate with nothing.
    """
    pairs = []
    rows = np.stack(miniatures) if names else np.zeros((0, 1), np.float32)  # (N, 512)
    for k in range(1, len(names)):
        matches = rows[:k] @ rows[k]
        pairs += [(names[int(j)], names[k], float(matches[j])) for j in np.flatnonzero(matches >= NEAR)]
    return pairs


def outliers(values: ArrayLike, floor: float) -> NDArray[np.bool_]:
    """Return which values lie apart from the rest, by median and median absolute deviation.

    A value is an outlier if 0.6745 |x - median| / MAD exceeds `FARTHEST`; with fewer than `FEWEST` values none is.

    Args:
        values: (N,), logarithms if ratios matter.
        floor: the least MAD, so that nearly equal values are not told apart.
    """
    x = np.asarray(values, np.float64)
    if len(x) < FEWEST:
        return np.zeros(len(x), bool)
    apart = np.abs(x - np.median(x))
    found: NDArray[np.bool_] = 0.6745 * apart / max(float(np.median(apart)), floor) > FARTHEST
    return found
