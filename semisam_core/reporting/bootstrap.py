"""Means with 95% intervals over cases and seeds, and paired differences, by a bootstrap of cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
LEVEL = 95.0
_AT_ONCE = 2_000_000  # drawn values held in memory

CaseKey = tuple[str, str]
Scores = Mapping[CaseKey, Mapping[int, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean over cases and its 95% percentile interval.

    Attributes:
        mean: mean over cases of each case's mean over seeds.
        low: lower end, None where a single case says nothing about the spread between cases.
        high: upper end, likewise.
        cases: how many cases.
        values: how many values, one a case and seed.
    """

    mean: float
    low: float | None
    high: float | None
    cases: int
    values: int


def estimate(scores: Scores, draws: int = DRAWS, seed: int = 0) -> Estimate | None:
    """Return the mean and its interval; None where there is no value.

    Cases are the clusters: each draw takes as many cases as there are, with replacement, and of each taken case as many
    seeds as it has, with replacement. With few cases (below about ten) such an interval is too narrow.

    Args:
        scores: (site, case) -> seed -> value.
        draws: bootstrap draws.
        seed: of the draws.
    """
    kept = [[by_seed[s] for s in sorted(by_seed)] for _, by_seed in sorted(scores.items()) if by_seed]
    if not kept:
        return None
    mean = float(np.mean([np.mean(values) for values in kept]))
    values = sum(len(each) for each in kept)
    if len(kept) == 1:
        return Estimate(mean, None, None, 1, values)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(_drawn_means(kept, draws, seed), [tail, 100 - tail])
    return Estimate(mean, float(low), float(high), len(kept), values)


def paired_difference(arm: Scores, baseline: Scores, draws: int = DRAWS, seed: int = 0) -> Estimate | None:
    """Return the mean of arm minus baseline over what both have, paired by case and seed; None where that is nothing.

    Args:
        arm: (site, case) -> seed -> value.
        baseline: likewise.
        draws: bootstrap draws.
        seed: of the draws.
    """
    differences = {
        case: {s: value - baseline[case][s] for s, value in by_seed.items() if s in baseline[case]}
        for case, by_seed in arm.items()
        if case in baseline
    }
    return estimate(differences, draws, seed)


def _drawn_means(values: list[list[float]], draws: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    counts = np.array([len(each) for each in values])
    widest = int(counts.max())
    padded = np.zeros((len(values), widest))
    for row, each in enumerate(values):
        padded[row, : len(each)] = each
    at_once = max(1, _AT_ONCE // padded.size)
    parts = []
    for start in range(0, draws, at_once):
        number = min(at_once, draws - start)
        cases = generator.integers(len(values), size=(number, len(values)))
        seeds = (generator.random((number, len(values), widest)) * counts[cases][..., None]).astype(np.int64)
        drawn = padded[cases[..., None], seeds]
        taken = np.arange(widest) < counts[cases][..., None]
        parts.append(((drawn * taken).sum(-1) / counts[cases]).mean(-1))
    return np.concatenate(parts)
