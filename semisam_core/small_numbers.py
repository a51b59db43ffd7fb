"""How numbers about few patients are coarsened before they leave a site, and how a server reads them."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

BUCKETS = (0, 1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
"""A count leaves as the lowest of its bucket: 0, 1-4, 5-9, 10-19, 20-49 and so on, 10,000 and more."""


def bucket(count: int) -> int:
    """Return the lowest count of a count's bucket."""
    return max(each for each in BUCKETS if each <= max(count, 0))


def bucket_top(lowest: int) -> float:
    """Return the highest count of the bucket that begins with `lowest`; infinity for the last."""
    place = bisect.bisect_right(BUCKETS, lowest)
    return BUCKETS[place] - 1 if place < len(BUCKETS) else math.inf


def bucket_middle(lowest: int) -> float:
    """Return the middle of the bucket that begins with `lowest`; of the last, which has no end, its beginning."""
    top = bucket_top(lowest)
    return float(lowest) if math.isinf(top) else (lowest + top) / 2


def bucket_words(lowest: int) -> str:
    """Return a bucket for people: `0`, `5-9`, `10000+`."""
    top = bucket_top(lowest)
    if top == lowest:
        return str(lowest)
    return f"{lowest}+" if math.isinf(top) else f"{lowest}-{top:.0f}"


@dataclass(frozen=True)
class Rounding:
    """How one number is coarsened.

    Attributes:
        kind: `exact`; `buckets`, see `BUCKETS`; `digits`, significant ones; `step`, a positive multiple of it.
        amount: number of digits, or the step.
    """

    kind: Literal["exact", "buckets", "digits", "step"] = "exact"
    amount: float = 0.0

    def __call__(self, value: float | int) -> float | int:
        """Return the number as it may leave; a whole number stays one."""
        if self.kind == "buckets":
            return bucket(int(value))
        if self.kind == "digits":
            return type(value)(float(f"{value:.{int(self.amount)}g}"))
        if self.kind == "step":
            return round(max(self.amount, round(value / self.amount) * self.amount), 4)
        return value

    def __str__(self) -> str:
        words = {
            "exact": "exact",
            "buckets": "0, 1-4, 5-9, 10-19, 20-49, ...",
            "digits": f"{self.amount:g} significant digits",
            "step": f"multiples of {self.amount:g}",
        }
        return words[self.kind]


EXACT = Rounding()
IN_BUCKETS = Rounding("buckets")
