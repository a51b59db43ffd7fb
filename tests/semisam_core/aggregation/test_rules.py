"""Robust rules agree with Flower's implementations and keep their promises about hostile updates."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from semisam_core.aggregation import coordinates
from semisam_core.aggregation.krum import squared_distances
from semisam_core.aggregation.median import median
from semisam_core.aggregation.trimmed_mean import trimmed_mean
from semisam_core.aggregation.weighted_mean import weighted_mean
from semisam_core.plan_sections.aggregation import Aggregation
from server.aggregation import combine, votes
from server.updates import MemoryUpdate, UpdateShelf

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 2), "b": (), "c": (5,)}


def _updates(count: int, seed: int) -> list[MemoryUpdate]:
    generator = torch.Generator().manual_seed(seed)
    return [
        MemoryUpdate(f"s{k:02d}", {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}, {})
        for k in range(count)
    ]


def _layers(update: MemoryUpdate) -> list[NDArray[np.float64]]:
    return [value.double().numpy() for value in update.weights.values()]


def _policy(rule: str, **keys: float) -> Aggregation:
    return Aggregation.model_validate({"rule": rule, "minimum_sites": 100, **keys})


COUNTS = st.integers(5, 12)
SEEDS = st.integers(0, 10_000)


@settings(deadline=None, max_examples=30)
@given(count=COUNTS, seed=SEEDS)
def test_the_median_equals_flowers(count: int, seed: int) -> None:
    updates = _updates(count, seed)
    expected = aggregate_median([(_layers(update), 1) for update in updates])
    found = median(updates, [], Aggregation())
    for value, oracle in zip(found.values(), expected, strict=True):
        assert np.allclose(value.numpy(), oracle, rtol=1e-6, atol=0)
        assert value.dtype == torch.float32


@settings(deadline=None, max_examples=30)
@given(count=COUNTS, seed=SEEDS, share=st.floats(0.2, 0.49))
def test_the_trimmed_mean_equals_flowers(count: int, seed: int, share: float) -> None:
    updates = _updates(count, seed)
    expected = aggregate_trimmed_avg([(_layers(update), 1) for update in updates], share)
    found = trimmed_mean(updates, [], Aggregation(trim_share=share))
    for value, oracle in zip(found.values(), expected, strict=True):
        assert np.allclose(value.numpy(), oracle, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(count=COUNTS, seed=SEEDS)
def test_krum_selects_the_same_update_as_flower(count: int, seed: int) -> None:
    updates = _updates(count, seed)
    policy = _policy("krum")
    counted = votes(updates, [1 / count] * count, policy)
    assert sorted(counted) == [0.0] * (count - 1) + [1.0]
    expected = aggregate_krum([(_layers(update), 1) for update in updates], 1, 0)
    for value, oracle in zip(combine(updates, counted, policy).values(), expected, strict=True):
        assert np.array_equal(value.double().numpy(), oracle)


@settings(deadline=None, max_examples=30)
@given(count=COUNTS, seed=SEEDS)
def test_multi_krum_keeps_the_same_updates_as_flower_with_their_weights(count: int, seed: int) -> None:
    updates = _updates(count, seed)
    shares = [(k + 1) / (count * (count + 1) / 2) for k in range(count)]
    counted = votes(updates, shares, _policy("multi-krum"))
    contents = [
        RecordDict({"w": ArrayRecord({n: Array(v.double().numpy()) for n, v in update.weights.items()})})
        for update in updates
    ]
    kept = {contents.index(each) for each in select_multikrum(contents, 1, count - 1)}
    assert {k for k, vote in enumerate(counted) if vote > 0} == kept
    assert sum(counted) == pytest.approx(1)
    total = sum(shares[k] for k in kept)
    assert all(counted[k] == pytest.approx(shares[k] / total) for k in kept)


def test_distances_between_close_updates_far_from_zero_are_exact() -> None:
    base = torch.full((1000,), 1000.0)
    updates = [MemoryUpdate(f"s{k}", {"w": base + 0.001 * k}, {}) for k in range(3)]
    expected = [
        [float((a.weights["w"].double() - b.weights["w"].double()).square().sum()) for a in updates] for b in updates
    ]
    assert np.allclose(squared_distances(updates), expected, rtol=1e-9)


@pytest.mark.parametrize("rule", ["weighted-mean", "median", "trimmed-mean", "krum", "multi-krum"])
def test_no_rule_depends_on_the_order_of_arrival(rule: str, tmp_path: Path) -> None:
    updates, policy = _updates(5, 3), _policy(rule)
    found = []
    for number, order in enumerate(itertools.islice(itertools.permutations(updates), 0, 120, 17)):
        shelf = UpdateShelf(tmp_path / str(number))
        for update in order:
            shelf.add(update.site, update.weights, {}, updates[0].weights)
        counted = votes(shelf.updates, [0.1, 0.2, 0.3, 0.25, 0.15], policy)
        found.append(combine(shelf.updates, counted, policy))
    assert all(torch.equal(each[name], found[0][name]) for each in found[1:] for name in SHAPES)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_the_block_size_changes_no_bit(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, policy = _updates(7, 5), _policy(rule)
    whole = combine(updates, votes(updates, [1 / 7] * 7, policy), policy)
    monkeypatch.setattr(coordinates, "BLOCK_VALUES", 14)
    pieces = combine(updates, votes(updates, [1 / 7] * 7, policy), policy)
    assert all(torch.equal(whole[name], pieces[name]) for name in SHAPES)


def test_the_default_rule_is_exactly_the_weighted_mean() -> None:
    updates, shares = _updates(4, 8), [0.1, 0.0, 0.3, 0.6]
    found = combine(updates, votes(updates, shares, Aggregation()), Aggregation())
    expected = weighted_mean(updates, shares)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_an_update_without_weight_has_no_vote(rule: str) -> None:
    updates, policy = _updates(6, 9), _policy(rule)
    shares = [0.2] * 5 + [0.0]
    with_it = combine(updates, votes(updates, shares, policy), policy)
    without = combine(updates[:5], votes(updates[:5], shares[:5], policy), policy)
    assert votes(updates, shares, policy)[5] == 0.0
    assert all(torch.equal(with_it[name], without[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("rule", "keys", "least"),
    [
        ("median", {}, 3),
        ("trimmed-mean", {"trim_share": 0.2}, 5),
        ("trimmed-mean", {"trim_share": 0.34}, 3),
        ("krum", {"malicious_sites": 1}, 5),
        ("multi-krum", {"malicious_sites": 2}, 7),
    ],
)
def test_too_few_updates_for_a_rule_is_an_error(rule: str, keys: dict[str, float], least: int) -> None:
    policy = _policy(rule, **keys)
    assert len(votes(_updates(least, 0), [1 / least] * least, policy)) == least
    too_few = _updates(least - 1, 0)
    with pytest.raises(ValueError, match=rf"{rule} needs {least} updates, there are {least - 1}"):
        votes(too_few, [1 / (least - 1)] * (least - 1), policy)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_a_rejected_site_counts_as_one_of_the_malicious_ones(rule: str) -> None:
    updates, policy = _updates(4, 4), _policy(rule)
    counted = votes(updates, [0.1, 0.2, 0.3, 0.4], policy, rejected=1)
    found = combine(updates, counted, policy)
    assert sum(counted) == pytest.approx(1)
    if rule == "multi-krum":
        assert counted == pytest.approx([0.1, 0.2, 0.3, 0.4])
    if rule == "trimmed-mean":
        mean = weighted_mean(updates, [0.25] * 4)
        assert all(torch.allclose(found[name], mean[name], atol=1e-6) for name in SHAPES)


def test_a_round_with_everything_rejected_has_nothing_to_combine() -> None:
    with pytest.raises(ValueError, match=r"krum needs 5 updates, there are 0 .* and 9 that were rejected"):
        votes([], [], _policy("krum"), rejected=9)
    with pytest.raises(ValueError, match="needs 3 updates, there are 2"):
        votes(_updates(2, 0), [0.5, 0.5], _policy("krum"), rejected=5)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, size=st.floats(1, 1e30), rule=st.sampled_from(["median", "trimmed-mean", "krum", "multi-krum"]))
def test_one_of_five_cannot_pull_any_coordinate_out_of_the_honest_range(seed: int, size: float, rule: str) -> None:
    honest, policy = _updates(4, seed), _policy(rule)
    hostile = MemoryUpdate("zz", {name: torch.full(shape, size + 10) for name, shape in SHAPES.items()}, {})
    updates = [*honest, hostile]
    found = combine(updates, votes(updates, [0.2] * 5, policy), policy)
    for name, value in found.items():
        values = torch.stack([update.weights[name] for update in honest])
        assert bool((value >= values.amin(0) - 1e-6).all())
        assert bool((value <= values.amax(0) + 1e-6).all())
