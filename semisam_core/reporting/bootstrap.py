"""Means over cases and seeds, and paired differences, with 95% intervals from a bootstrap over cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
LEVEL = 95.0
_AT_ONCE = 2_000_000  # drawn values in memory at a time

CaseKey = tuple[str, str]
Scores = Mapping[CaseKey, Mapping[int, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean over cases and its 95% percentile interval.

    Attributes:
        mean: mean over cases of each case's mean over seeds.
        low: lower end; None for a single case, which tells nothing about the spread between cases.
        high: upper end, likewise.
        cases: number of cases.
        values: number of values, one per case and seed.
    """

    mean: float
    low: float | None
    high: float | None
    cases: int
    values: int


def estimate(scores: Scores, draws: int = DRAWS, seed: int = 0) -> Estimate | None:
    """Return the mean and its interval, or None if there are no values.

    Cases are the clusters: each draw resamples all cases with replacement, then the seeds of each drawn case with
    replacement. With fewer than about ten cases the interval is too narrow.

    Args:
        scores: (site, case) -> seed -> value.
        draws: number of bootstrap draws.
        seed: seed of the draws.
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
    """Return the mean of arm minus baseline, paired by case and seed; None if they share no case and seed.

    Args:
        arm: (site, case) -> seed -> value.
        baseline: likewise.
        draws: number of bootstrap draws.
        seed: seed of the draws.
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
