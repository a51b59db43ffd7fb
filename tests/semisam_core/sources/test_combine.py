"""Several sources to one: reliable ones count more, one that is alone in what it says counts little."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from semisam_core.sources.base import Evidence
from semisam_core.sources.combine import combine_evidence, soft_dice

SHAPE = (2, 6, 5, 4)


def _evidence(seed: int, answered: tuple[bool, bool] = (True, True)) -> Evidence:
    maps = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))
    return Evidence(maps, torch.tensor(answered))


def _ball(shift: int = 0, high: float = 0.95) -> Tensor:
    maps = torch.full((1, 12, 12, 12), 1 - high)
    maps[:, 3 + shift : 8 + shift, 3:8, 3:8] = high
    return maps


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_shares_sum_to_one_over_those_that_answered_and_the_mean_stays_between_them(
    drawn: list[tuple[int, bool, bool]],
) -> None:
    evidence = {f"s{n}": _evidence(seed, (a, b)) for n, (seed, a, b) in enumerate(drawn)}
    combined = combine_evidence(evidence)
    for k in range(2):
        speaking = [name for name, each in evidence.items() if each.answered[k]]
        assert int(combined.sources[k]) == len(speaking)
        assert sum(float(w[k]) for w in combined.weights.values()) == pytest.approx(1.0 if speaking else 0.0)
        assert all(float(combined.weights[name][k]) == 0 for name in evidence if name not in speaking)
        if speaking:
            maps = torch.stack([evidence[name].foreground[k] for name in speaking])
            assert bool((combined.foreground[k] >= maps.amin(0) - 1e-6).all())
            assert bool((combined.foreground[k] <= maps.amax(0) + 1e-6).all())


@given(st.permutations(["a", "b", "c"]))
def test_the_order_of_sources_changes_nothing_beyond_rounding(order: list[str]) -> None:
    evidence = {name: _evidence(ord(name)) for name in "abc"}
    one, other = combine_evidence(evidence), combine_evidence({name: evidence[name] for name in order})
    assert torch.allclose(one.foreground, other.foreground, atol=1e-6)


def test_a_source_that_is_alone_in_what_it_says_counts_less_than_those_that_agree() -> None:
    alone = Evidence.of(_ball(shift=4))
    combined = combine_evidence({"a": Evidence.of(_ball()), "b": Evidence.of(_ball()), "alone": alone})
    assert float(combined.weights["alone"][0]) < 0.2 < float(combined.weights["a"][0])
    assert torch.equal(combined.foreground > 0.5, _ball() > 0.5)


def test_with_two_sources_reliability_decides() -> None:
    evidence = {"good": Evidence.of(_ball()), "bad": Evidence.of(_ball(shift=4))}
    assert float(combine_evidence(evidence).weights["good"][0]) == pytest.approx(0.5)
    scored = combine_evidence(evidence, {"good": torch.tensor([0.9]), "bad": torch.tensor([0.3])})
    assert float(scored.weights["good"][0]) == pytest.approx(0.75)


def test_a_source_without_a_score_counts_as_much_as_the_mean_of_the_scored_ones() -> None:
    evidence = {name: Evidence.of(_ball()) for name in ("teacher", "good", "bad")}
    weights = combine_evidence(evidence, {"good": torch.tensor([0.8]), "bad": torch.tensor([0.4])}).weights
    assert float(weights["teacher"][0]) == pytest.approx(1 / 3)


def test_sources_that_find_nothing_do_not_outvote_one_that_does() -> None:
    empty = Evidence.of(torch.zeros(1, 12, 12, 12))
    combined = combine_evidence({"teacher": Evidence.of(_ball()), "b": empty, "c": empty})
    assert torch.equal(combined.foreground, _ball())
    assert int(combined.sources[0]) == 1


def test_the_more_sources_differ_the_lower_is_their_agreement() -> None:
    agreement = [
        float(combine_evidence({"a": Evidence.of(_ball()), "b": Evidence.of(_ball(shift))}).agreement[0])
        for shift in (0, 1, 4)
    ]
    assert agreement[0] == pytest.approx(1.0)
    assert agreement[0] > agreement[1] > agreement[2]


def test_soft_dice_is_dice_for_masks_and_zero_where_both_are_empty() -> None:
    one, other = (_ball(0, 1.0), _ball(2, 1.0))
    both = float((one * other).sum())
    assert soft_dice(one, other) == pytest.approx(2 * both / float(one.sum() + other.sum()))
    assert soft_dice(torch.zeros(3), torch.zeros(3)) == 0
