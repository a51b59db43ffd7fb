"""The noise is normal with the right deviation, patients are drawn independently, and only a seed repeats either."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from semisam_core.privacy import randomness
from semisam_core.privacy.randomness import Randomness, SecureRandomness, SeededRandomness

SOURCES = [SecureRandomness(), SeededRandomness(0)]
EVERY_SOURCE = pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)


@EVERY_SOURCE
@pytest.mark.parametrize("deviation", [1.0, 0.37])
def test_noise_is_normal(source: Randomness, deviation: float) -> None:
    noise = source.normal(torch.Size((40, 50, 20)), deviation)
    assert noise.shape == (40, 50, 20)
    assert noise.dtype == torch.float64
    values = noise.flatten().numpy()
    assert abs(values.std() / deviation - 1) < 0.02
    assert kstest(values / deviation, "norm").pvalue > 1e-6
    lag = np.corrcoef(values[:-1], values[1:])[0, 1]
    halves = np.corrcoef(values[: len(values) // 2], values[len(values) // 2 :])[0, 1]
    assert abs(lag) < 0.03
    assert abs(halves) < 0.04


@EVERY_SOURCE
def test_patients_are_drawn_independently_of_each_other(source: Randomness) -> None:
    rounds = [source.chosen(50, 0.2) for _ in range(2000)]
    often = np.bincount([patient for each in rounds for patient in each], minlength=50) / 2000
    assert np.abs(often - 0.2).max() < 0.05
    sizes = np.array([len(each) for each in rounds])
    assert sizes.mean() == pytest.approx(10, abs=0.4)
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.15)  # binomial: a fixed number would have none


@EVERY_SOURCE
def test_all_or_nobody_may_be_drawn(source: Randomness) -> None:
    assert source.chosen(5, 1.0) == [0, 1, 2, 3, 4]
    assert source.chosen(0, 0.5) == []
    assert source.normal(torch.Size(()), 1.0).shape == ()


def test_only_a_seed_repeats_what_was_drawn() -> None:
    shape = torch.Size((8,))
    one, other = (SecureRandomness().normal(shape, 1.0) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(SeededRandomness(3).normal(shape, 1.0), SeededRandomness(3).normal(shape, 1.0))
    assert not torch.equal(SeededRandomness(3).normal(shape, 1.0), SeededRandomness(4).normal(shape, 1.0))


def test_secure_draws_depend_on_nothing_but_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def zeros(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr(randomness.os, "urandom", zeros)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert SecureRandomness().normal(torch.Size((4,)), 1.0).tolist() == [0, 0, 0, 0]
    assert SecureRandomness().chosen(3, 0.5) == [0, 1, 2]
    assert sum(asked) == 8 * (2 * 2 * 4 + 3)


def test_the_draw_of_patients_ahead_of_the_noise_changes_neither() -> None:
    early, late = SeededRandomness(0), SeededRandomness(0)
    drawn, noise = early.chosen(9, 0.5), early.normal(torch.Size((3,)), 1.0)
    assert torch.equal(late.normal(torch.Size((3,)), 1.0), noise)
    assert late.chosen(9, 0.5) == drawn
