"""Histograms as bars in the units of an SVG; the page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 320, 120
MOST_BARS = 24


@dataclass(frozen=True)
class Bar:
    """One bar: its left upper corner and size, and how many values it stands for."""

    x: float
    y: float
    width: float
    height: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """Bars from the lowest to the highest value.

    Attributes:
        title: what is counted.
        unit: of the values; empty if they have none.
        low: the lowest value.
        high: the highest value.
        bars: from left to right, within `WIDTH` and `HEIGHT`.
        values: how many values there are.
    """

    title: str
    unit: str
    low: float
    high: float
    bars: tuple[Bar, ...]
    values: int


def histogram(title: str, unit: str, values: Sequence[float]) -> Histogram | None:
    """Return a histogram of finite values, one for each case; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    bins = min(MOST_BARS, 1 + math.ceil(2 * math.sqrt(len(finite))))
    # In [-1, 1], since the range of the values may be too large for a float.
    shares = np.array(finite) / (max(abs(low), abs(high)) or 1.0)
    # Edges closer together than a float can tell make one bar of values that are all but equal.
    spread = np.ptp(shares) > 1e-9
    counts = np.histogram(shares, bins=bins)[0] if spread else np.array([len(finite)])
    step, width = (WIDTH / len(counts),) * 2 if spread else (0.0, WIDTH / 8)
    heights = HEIGHT * counts / counts.max()
    bars = tuple(
        Bar(
            round(k * step, 1),
            round(HEIGHT - float(tall), 1),
            round(max(width - 1, 1), 1),
            round(float(tall), 1),
            int(n),
        )
        for k, (tall, n) in enumerate(zip(heights, counts, strict=True))
    )
    return Histogram(title, unit, low, high, bars, len(finite))
