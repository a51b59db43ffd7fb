"""Kappa against values worked out by hand and against its definition; Dice; the picture of all ratings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.reviews import Decision, ReviewRecord
from review.agreement import agreement, cohens_kappa
from review.distribution import draw_distribution, rating_counts

RATINGS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=30)


def _record(
    case: str, rater: str, rating: int, label: str | None = None, shown: str = "a", round: int = 1
) -> ReviewRecord:
    labeled, unchanged = label is not None, label == shown
    decision = (Decision.ACCEPTED if unchanged else Decision.CORRECTED) if labeled else Decision.RATED
    return ReviewRecord(
        time="2026-03-01T09:30:00Z",
        case=case,
        rater=rater,
        ratings={"blob": rating},
        minutes=1.0,
        decision=Decision.REJECTED if rating == 4 and not labeled else decision,
        pseudo_label=shown * 64,
        source="0" * 64,
        label=None if label is None else label * 64,
        run="run",
        round=round,
        images=("1" * 64,),
        classes={"blob": (1,)},
        tool="page",
    )


def test_kappa_of_the_textbook_example() -> None:
    # 50 things: both say 1 of 20, both 2 of 15; 5 and 10 apart. Observed 0.7, by chance 0.5: kappa 0.4.
    first = [1] * 20 + [1] * 5 + [2] * 10 + [2] * 15
    second = [1] * 20 + [2] * 5 + [1] * 10 + [2] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)


@given(pairs=RATINGS)
def test_kappa_is_what_its_definition_says(pairs: list[tuple[int, int]]) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    n = len(pairs)
    observed = sum(one == other for one, other in pairs) / n
    chance = sum(first.count(grade) * second.count(grade) for grade in range(1, 5)) / n**2
    found = cohens_kappa(first, second)
    assert (found is None) == (chance == 1)
    if found is not None:
        assert found == pytest.approx((observed - chance) / (1 - chance))
        assert cohens_kappa(second, first) == pytest.approx(found)


def test_weights_count_far_ratings_more() -> None:
    near, far = ([1, 2, 3, 4], [2, 2, 3, 4]), ([1, 2, 3, 4], [4, 2, 3, 4])
    assert cohens_kappa(*near) == pytest.approx(cohens_kappa(*near) or 0)
    one, other = cohens_kappa(*near, weighted=True), cohens_kappa(*far, weighted=True)
    assert one is not None
    assert other is not None
    assert one > 0.8 > other
    assert cohens_kappa([1, 4, 2], [1, 4, 2], weighted=True) == 1
    assert cohens_kappa([], []) is None
    with pytest.raises(ValueError, match="shorter"):
        cohens_kappa([1, 2], [1])


def test_raters_are_compared_on_the_same_pseudo_labels_by_their_last_words() -> None:
    masks = {"b": np.array([[[1, 1, 0, 0]]]), "c": np.array([[[1, 0, 0, 0]]])}
    records = [
        _record("x", "r1", 4),
        _record("x", "r2", 2, "c"),
        _record("x", "r1", 3, "b"),
        _record("y", "r1", 2),
        _record("y", "r2", 2),
        _record("z", "r1", 2),
        _record("z", "r2", 3, shown="9"),  # another pseudo-label
        _record("x", "r3", 4),
    ]

    def mask(record: ReviewRecord) -> NDArray[np.uint8]:
        return masks[(record.label or "")[0]].astype(np.uint8)

    (found,) = agreement(records, ("r1", "r2"), ["blob"], mask)
    assert (found.scans, found.masks) == (2, 1)
    assert found.dice == pytest.approx(2 / 3)
    assert found.kappa == pytest.approx(cohens_kappa([3, 2], [2, 2]) or 0)


def test_ratings_are_counted_by_class_and_model_and_drawn(tmp_path: Path) -> None:
    records = [
        _record("x", "r1", 4),
        _record("x", "r1", 2),  # the last word
        _record("x", "r2", 4),
        _record("y", "r1", 2),
        _record("y", "r1", 3, shown="9", round=5),
    ]
    counts = rating_counts(records)
    assert counts == {("blob", "run, round 1"): (0, 2, 0, 1), ("blob", "run, round 5"): (0, 0, 1, 0)}
    files = draw_distribution(counts, tmp_path / "pictures")
    svg, png = (path.read_bytes() for path in files)
    assert png.startswith(b"\x89PNG")
    assert b"minor revision" in svg
    assert b"run, round 5" in svg
    assert draw_distribution(counts, tmp_path / "again")[0].read_bytes() == svg
