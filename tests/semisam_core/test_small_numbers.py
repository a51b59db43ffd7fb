"""Buckets and rounding: coarse, monotone, and stable when applied twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semisam_core.small_numbers import BUCKETS, Rounding, bucket, bucket_middle, bucket_top, bucket_words

COUNTS = st.integers(0, 30_000)


@given(count=COUNTS)
def test_a_count_lies_in_its_bucket(count: int) -> None:
    lowest = bucket(count)
    assert lowest in BUCKETS
    assert lowest <= count <= bucket_top(lowest)
    assert lowest <= bucket_middle(lowest) <= bucket_top(lowest)
    assert bucket(lowest) == lowest


@given(one=COUNTS, other=COUNTS)
def test_buckets_keep_the_order_and_do_not_overlap(one: int, other: int) -> None:
    first, second = sorted((one, other))
    assert bucket(first) <= bucket(second)
    assert bucket(first) == bucket(second) or bucket_top(bucket(first)) < bucket(second)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0"), (1, "1-4"), (4, "1-4"), (5, "5-9"), (37, "20-49"), (12_345, "10000+")]
)
def test_a_bucket_in_words(count: int, words: str) -> None:
    assert bucket_words(bucket(count)) == words


def test_nothing_is_its_own_bucket() -> None:
    assert (bucket(0), bucket_middle(0), bucket(1), bucket_middle(1)) == (0, 0.0, 1, 2.5)


@given(value=st.floats(-1e9, 1e9), digits=st.integers(1, 6))
def test_significant_digits_are_kept_and_no_more(value: float, digits: int) -> None:
    rounding = Rounding("digits", digits)
    found = rounding(value)
    assert found == rounding(found)
    assert abs(found - value) <= abs(value) * 0.51 * 10.0 ** (1 - digits)
    assert 0 <= rounding(abs(value) / 1e9) <= 1


def test_whole_numbers_stay_whole() -> None:
    assert repr(Rounding("digits", 2)(1234)) == "1200"
    assert repr(Rounding("buckets")(7)) == "5"
    assert repr(Rounding()(7)) == "7"
