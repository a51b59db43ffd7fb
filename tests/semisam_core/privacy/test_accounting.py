"""Epsilon of noisy steps, against the exact formula where there is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from semisam_core.privacy.accounting import PRV_LIMIT, Spending, epsilon_of

DELTA = 1e-5


def _exact(noise: float, steps: int, delta: float) -> float:
    """Return the epsilon of steps of the Gaussian mechanism on all patients (Balle and Wang, ICML 2018, theorem 8)."""
    mean = math.sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        return float(
            norm.cdf(mean / 2 - epsilon / mean) - math.exp(epsilon) * norm.cdf(-mean / 2 - epsilon / mean) - delta
        )

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 10), (5.0, 100), (0.7, 3)])
def test_without_sampling_epsilon_is_just_above_the_exact_one(noise: float, steps: int) -> None:
    exact, found = _exact(noise, steps, DELTA), epsilon_of([Spending(noise, 1.0, steps)], DELTA)
    assert found.prv is not None
    assert exact <= found.prv <= exact * 1.03 + 0.05
    assert found.rdp >= exact


def test_nothing_spent_costs_nothing() -> None:
    assert epsilon_of([], DELTA).value == 0
    assert epsilon_of([Spending(1.0, 0.1, 0)], DELTA).value == 0


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.7, 0.5), (2.0, 0.05)])
def test_with_sampling_epsilon_of_a_step_is_just_above_the_integral(noise: float, rate: float) -> None:
    """delta(epsilon) of one step is the integral of max(p - e^epsilon q, 0), in the worse of the two directions."""
    x = np.linspace(-12 * noise, 1 + 12 * noise, 400_001)
    without, present = norm.pdf(x, 0, noise), norm.pdf(x, 1, noise)
    mixed = (1 - rate) * without + rate * present

    def excess(epsilon: float) -> float:
        pairs = ((mixed, without), (without, mixed))
        deltas = [np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x) for p, q in pairs]
        return float(max(deltas) - DELTA)

    exact = float(brentq(excess, 0, 50))
    found = epsilon_of([Spending(noise, rate, 1)], DELTA)
    assert found.prv is not None
    assert exact - 1e-4 <= found.prv <= exact * 1.03 + 0.02
    assert found.rdp >= exact


def test_more_costs_more_and_neither_order_nor_parts_matter() -> None:
    spent, more = [Spending(1.0, 0.1, 4), Spending(3.0, 0.3, 3)], Spending(0.8, 0.1, 2)
    before, after = epsilon_of(spent, DELTA), epsilon_of([*spent, more], DELTA)
    assert after.rdp > before.rdp
    assert after.value > before.value
    one_by_one = [Spending(each.noise_multiplier, each.sampling_rate, 1) for each in spent for _ in range(each.steps)]
    assert epsilon_of(list(reversed(one_by_one)), DELTA) == before


def test_less_noise_more_patients_and_a_smaller_delta_cost_more() -> None:
    base = epsilon_of([Spending(1.0, 0.1, 20)], DELTA).value
    assert epsilon_of([Spending(0.8, 0.1, 20)], DELTA).value > base
    assert epsilon_of([Spending(1.0, 0.2, 20)], DELTA).value > base
    assert epsilon_of([Spending(1.0, 0.1, 20)], DELTA / 100).value > base


@pytest.mark.parametrize("spending", [Spending(0.01, 1.0, 1000), Spending(0.1, 0.9, 10**6), Spending(1e-3, 1.0, 1)])
def test_a_senseless_budget_is_still_bounded_in_time_and_from_below(spending: Spending) -> None:
    found = epsilon_of([spending], DELTA)
    assert found.accountant == "rdp"
    assert found.value > PRV_LIMIT


def test_the_bound_that_counts_says_whose_it_is() -> None:
    found = epsilon_of([Spending(1.0, 0.1, 20)], DELTA)
    assert found.accountant == "prv"
    assert found.value == found.prv
    assert found.value < found.rdp
