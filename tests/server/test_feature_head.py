"""The feature head at the server: combined from the sites that trained it, by the plan's rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semisam_core.contract import HEAD_PREFIX
from server.aggregation import combine_heads
from server.updates import MemoryUpdate
from tests.conftest import tiny_plan

NAME = f"{HEAD_PREFIX}views.axial.second.bias"
CURRENT = {NAME: torch.zeros(2), "conv.weight": torch.zeros(3)}


def _update(site: str, value: float, labeled: int, head_steps: int = 5) -> MemoryUpdate:
    scalars = {"labeled": float(labeled), "unlabeled": 4.0, "steps": 2.0, "accepted": 1.0, "confidence": 0.5}
    weights = {NAME: torch.full((2,), value), "conv.weight": torch.full((3,), value)}
    return MemoryUpdate(site, weights, scalars | {"head_steps": float(head_steps)})


def _policy(*changes: str):  # type: ignore[no-untyped-def]
    return tiny_plan(*changes).aggregation


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 5]), st.floats(-2, 2)), min_size=1, max_size=6))
def test_a_head_is_the_mean_over_labeled_scans_of_the_sites_that_trained_it(
    drawn: list[tuple[int, int, float]],
) -> None:
    updates = [_update(f"s{n}", value, labeled, steps) for n, (labeled, steps, value) in enumerate(drawn)]
    found = combine_heads(updates, CURRENT, _policy())
    weights = [labeled if steps else 0 for labeled, steps, _ in drawn]
    expected = sum(w * value for w, (_, _, value) in zip(weights, drawn, strict=True)) / max(1, sum(weights))
    assert set(found) == {NAME}
    assert float(found[NAME][0]) == pytest.approx(expected if sum(weights) else 0.0, abs=1e-5)


def test_a_robust_rule_holds_for_the_head_too() -> None:
    updates = [_update(name, value, 1) for name, value in (("a", 1.0), ("b", 1.1), ("c", 1000.0))]
    found = combine_heads(updates, CURRENT, _policy("aggregation.rule=median", "aggregation.minimum_sites=3"))
    assert float(found[NAME][0]) == pytest.approx(1.1)


def test_with_fewer_heads_than_the_rule_needs_it_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    updates = [_update("a", 1.0, 1), _update("b", 1.0, 1), _update("c", 1.0, 0, 0)]
    found = combine_heads(updates, CURRENT, _policy("aggregation.rule=median", "aggregation.minimum_sites=3"))
    assert torch.equal(found[NAME], CURRENT[NAME])
    assert "left as it is" in caplog.text


def test_without_a_head_nothing_is_combined() -> None:
    assert combine_heads([_update("a", 1.0, 1)], {"conv.weight": torch.zeros(3)}, _policy()) == {}
