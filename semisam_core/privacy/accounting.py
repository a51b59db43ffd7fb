"""How much privacy noisy steps cost, by Opacus's accountants."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

PRV_LIMIT = 200.0  # epsilon above which the PRV accountant is not asked: its grid would fill the memory


@dataclass(frozen=True)
class Spending:
    """Steps of the Gaussian mechanism, each on patients drawn by Poisson sampling.

    Attributes:
        noise_multiplier: the noise's standard deviation by the clipping norm.
        sampling_rate: probability with which each patient is drawn at a step.
        steps: number of steps.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int


@dataclass(frozen=True)
class Epsilon:
    """Upper bounds on the epsilon of all spendings together.

    Attributes:
        prv: by the PRV accountant (Gopi et al., NeurIPS 2021), with its numerical error added; None above `PRV_LIMIT`.
        rdp: by Renyi differential privacy (Mironov, CSF 2017).
    """

    prv: float | None
    rdp: float

    @property
    def value(self) -> float:
        """The bound that counts: the PRV accountant's where there is one."""
        return self.rdp if self.prv is None else self.prv

    @property
    def accountant(self) -> str:
        """Whose bound counts, `prv` or `rdp`."""
        return "rdp" if self.prv is None else "prv"


def epsilon_of(spent: Iterable[Spending], delta: float) -> Epsilon:
    """Return bounds on epsilon at a delta for everything that was spent on the same patients.

    Neighbouring data sets differ in one patient, who is in one and not in the other.

    Args:
        spent: in any order.
        delta: between 0 and 1.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for each in spent:
        steps[each.noise_multiplier, each.sampling_rate] += each.steps
    return _bounds(tuple((noise, rate, count) for (noise, rate), count in sorted(steps.items()) if count > 0), delta)


@cache
def _bounds(history: tuple[tuple[float, float, int], ...], delta: float) -> Epsilon:
    """Return the bounds for (noise multiplier, sampling rate, steps) of each kind of step."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    if not history:
        return Epsilon(0.0, 0.0)
    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history, prv.history = list(history), list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders at the end of the range, and of log(0), which is then not used
        coarse = float(rdp.get_epsilon(delta))
        if not coarse <= PRV_LIMIT:
            return Epsilon(None, math.inf if math.isnan(coarse) else coarse)
        fine = float(prv.get_epsilon(delta, eps_error=0.01 * max(1.0, coarse)))
    return Epsilon(fine if math.isfinite(fine) else None, coarse)
