"""Intervals have their nominal coverage, and differences use the pairing."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from semisam_core.reporting.bootstrap import CaseKey, Estimate, estimate, paired_difference

values = st.floats(-100, 100, allow_nan=False)
tables = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.text("xyz", min_size=1, max_size=3)),
    st.dictionaries(st.integers(0, 4), values, min_size=1, max_size=3),
    min_size=2,
    max_size=8,
)


def _cases(matrix: np.ndarray) -> dict[CaseKey, dict[int, float]]:
    """Return a matrix (cases, seeds) as scores."""
    return {("site", f"{k:03d}"): dict(enumerate(row.tolist())) for k, row in enumerate(matrix)}


def _known(value: Estimate | None) -> tuple[float, float, float]:
    assert value is not None
    assert value.low is not None
    assert value.high is not None
    return value.low, value.mean, value.high


@settings(max_examples=50, deadline=None)
@given(tables)
def test_the_interval_contains_the_mean(scores: dict[CaseKey, dict[int, float]]) -> None:
    low, mean, high = _known(estimate(scores, draws=2000))
    assert low - 1e-9 <= mean <= high + 1e-9


@settings(max_examples=50, deadline=None)
@given(tables, st.integers(0, 1000))
def test_the_order_of_cases_and_seeds_changes_nothing(scores: dict[CaseKey, dict[int, float]], seed: int) -> None:
    def shuffled(mapping: dict) -> dict:
        items = list(mapping.items())
        random.Random(seed).shuffle(items)
        return dict(items)

    other = shuffled({case: shuffled(by_seed) for case, by_seed in scores.items()})
    assert estimate(scores, draws=500) == estimate(other, draws=500)


@settings(max_examples=30, deadline=None)
@given(tables, values)
def test_an_arm_that_is_better_by_a_constant_differs_by_exactly_that(
    scores: dict[CaseKey, dict[int, float]], shift: float
) -> None:
    moved = {case: {seed: value + shift for seed, value in by_seed.items()} for case, by_seed in scores.items()}
    found = _known(paired_difference(moved, scores, draws=200))
    assert found == pytest.approx((shift, shift, shift), abs=1e-6)


def test_for_many_normal_scores_the_interval_is_students_t() -> None:
    sample = np.random.default_rng(0).normal(0.8, 0.1, (200, 1))
    low, _, high = _known(estimate(_cases(sample)))
    expected = stats.t.interval(0.95, 199, sample.mean(), stats.sem(sample[:, 0]))
    assert (low, high) == pytest.approx(expected, abs=0.002)


def test_the_interval_of_a_difference_has_about_its_nominal_coverage() -> None:
    covered = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        hardness = generator.normal(0.0, 0.2, (30, 1))
        baseline = 0.7 + hardness + generator.normal(0, 0.05, (30, 2))
        arm = 0.75 + hardness + generator.normal(0, 0.05, (30, 2))
        low, _, high = _known(paired_difference(_cases(arm), _cases(baseline), draws=1000))
        covered += low <= 0.05 <= high
    assert 178 <= covered <= 200


def test_pairing_removes_the_difficulty_of_each_case() -> None:
    generator = np.random.default_rng(1)
    hardness = generator.normal(0, 0.2, (40, 1))
    baseline, arm = (level + hardness + generator.normal(0, 0.02, (40, 2)) for level in (0.7, 0.72))
    low, _, high = _known(paired_difference(_cases(arm), _cases(baseline)))
    unpaired = [_known(estimate(_cases(each))) for each in (arm, baseline)]
    assert low > 0
    assert high - low < 0.3 * min(each[2] - each[0] for each in unpaired)


def test_many_seeds_of_few_cases_do_not_narrow_the_interval() -> None:
    of_cases = np.random.default_rng(2).normal(0.7, 0.1, (12, 1))
    once, often = (_known(estimate(_cases(np.repeat(of_cases, seeds, 1)))) for seeds in (1, 20))
    assert often[2] - often[0] == pytest.approx(once[2] - once[0], rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    of_cases = np.random.default_rng(3).normal(0.7, 0.01, (12, 1))
    spread = of_cases + np.array([[-0.2, 0.2]])
    narrow, wide = (_known(estimate(_cases(each))) for each in (np.repeat(of_cases, 2, 1), spread))
    assert wide[2] - wide[0] > 2 * (narrow[2] - narrow[0])


def test_a_case_counts_once_however_many_seeds_it_has() -> None:
    scores = {("a", "1"): {0: 0.0, 1: 0.0, 2: 0.0}, ("a", "2"): {0: 1.0}}
    found = estimate(scores)
    assert found is not None
    assert (found.mean, found.cases, found.values) == (0.5, 2, 4)


def test_one_case_has_a_mean_and_no_interval() -> None:
    assert estimate({("a", "1"): {0: 0.4, 1: 0.6}}) == Estimate(0.5, None, None, 1, 2)


def test_only_shared_cases_and_seeds_are_paired() -> None:
    arm = {("a", "1"): {0: 0.5, 1: 0.9}, ("a", "2"): {0: 0.7}, ("b", "1"): {0: 0.0}}
    baseline = {("a", "1"): {0: 0.4}, ("a", "2"): {0: 0.5, 2: 0.0}}
    found = paired_difference(arm, baseline)
    assert found is not None
    assert (found.cases, found.values) == (2, 2)
    assert found.mean == pytest.approx(0.15)
    assert paired_difference({("c", "1"): {0: 1.0}}, baseline) is None
