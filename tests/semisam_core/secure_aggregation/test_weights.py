"""Whole weights, in buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semisam_core.plan_sections.aggregation import SecureAggregation
from semisam_core.secure_aggregation.weights import WholeWeights, whole_weight, whole_weights
from tests.conftest import tiny_plan

SECURE = "aggregation={secure: {}, admission: {norm_factor: null}, minimum_sites: 3, weights: %s}"
REPORT = {"labeled": 3.0, "unlabeled": 2.0, "accepted": 2.0, "confidence": 0.5, "steps": 2.0}


def test_a_weight_is_in_quarters_of_a_scan_and_in_buckets() -> None:
    bound = SecureAggregation()
    found = [whole_weight(scans, bound) for scans in (0, 0.01, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 3, 3.75, 4, 100)]
    assert found == [0, 1, 1, 2, 3, 4, 4, 6, 6, 8, 12, 12, 16, 384]
    assert whole_weight(1e300, bound) == 1024
    assert whole_weight(50, SecureAggregation(maximum_weight=100)) == 100


@given(st.floats(0.25, 256))
def test_a_bucket_is_at_most_the_weight_and_more_than_half_of_it(scans: float) -> None:
    weight = whole_weight(scans, SecureAggregation())
    assert weight <= round(4 * scans)
    assert weight > round(4 * scans) / 2


@pytest.mark.parametrize(("weights", "expected"), [("equal", 4), ("samples", 16), ("evidence", 12), ("confidence", 12)])
def test_weights_follow_the_plan(weights: str, expected: int) -> None:
    assert whole_weights(REPORT, tiny_plan(SECURE % weights), 2) == WholeWeights(expected, 0)


def test_a_site_without_steps_has_no_weight_and_a_trained_head_that_of_its_labels() -> None:
    plan = tiny_plan(SECURE % "equal")
    assert whole_weights(REPORT | {"steps": 0.0, "head_steps": 5.0}, plan, 1) == WholeWeights(0, 0)
    assert whole_weights(REPORT | {"head_steps": 5.0}, plan, 1) == WholeWeights(4, 12)


def test_a_plan_without_a_secure_sum_has_no_whole_weights() -> None:
    with pytest.raises(ValueError, match="does not ask"):
        whole_weights(REPORT, tiny_plan(), 1)
