"""Charts: whatever the numbers, what is drawn lies within the picture and stands for them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Value, bar_chart, line_chart, pair_chart

ROUNDS = 30
shares = st.floats(0, 1)
numbers = st.integers(1, ROUNDS)


@given(st.dictionaries(numbers, st.none() | shares, max_size=ROUNDS))
def test_lines_stay_within_the_picture_and_break_where_a_round_has_no_score(values: dict[int, float | None]) -> None:
    (line,) = line_chart("", "", [values], ROUNDS).lines
    points = [point for piece in line.pieces for point in piece]
    assert len(points) == sum(value is not None for value in values.values())
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in points)
    assert all(list(piece) == sorted(piece, key=lambda point: point[0]) for piece in line.pieces)
    missing = [number for number, value in values.items() if value is None]
    known = sorted(number for number, value in values.items() if value is not None)
    between = sum(any(a < number < b for number in missing) for a, b in itertools.pairwise(known))
    assert len(line.pieces) == (between + 1 if known else 0)


@given(st.dictionaries(numbers, st.tuples(*[st.floats(0, 1e6)] * 3), min_size=1), st.booleans())
def test_bars_are_stacked_within_the_picture(columns: dict[int, tuple[float, ...]], as_shares: bool) -> None:
    chart = bar_chart("", "", columns, ROUNDS, as_shares)
    for part in chart.parts:
        assert TOP - 0.2 <= part.y <= part.y + part.height <= BOTTOM + 0.2
        assert LEFT - 1 <= part.x <= part.x + part.width <= RIGHT + 1


def test_bars_of_shares_fill_the_picture_and_bars_of_counts_follow_their_numbers() -> None:
    filled = bar_chart("", "", {1: (1.0, 3.0, 0.0)}, 1, shares=True).parts
    assert [round(part.height / (BOTTOM - TOP), 2) for part in filled] == [0.25, 0.75]
    counted = bar_chart("", "", {1: (2.0, 2.0), 2: (1.0, 0.0)}, 2, shares=False).parts
    assert [(part.style, round(part.height / (BOTTOM - TOP), 2)) for part in counted] == [
        ("a", 0.5),
        ("b", 0.5),
        ("a", 0.25),
    ]


@given(st.lists(st.tuples(st.text(max_size=80), st.none() | shares, st.none() | shares), max_size=12))
def test_pairs_lie_on_one_scale_that_holds_all_of_them(rows: list[tuple[str, float | None, float | None]]) -> None:
    drawn = [(name, *(None if each is None else Value(each) for each in pair)) for name, *pair in rows]
    chart = pair_chart("", "", drawn)  # type: ignore[arg-type]
    assert [len(row.marks) for row in chart.rows] == [sum(each is not None for each in pair) for _, *pair in rows]
    low, high = float(chart.ticks[0].words), float(chart.ticks[-1].words)
    for (_, first, second), row in zip(rows, chart.rows, strict=True):
        for mark, value in zip(row.marks, [each for each in (second, first) if each is not None], strict=True):
            share = (mark.x - chart.ticks[0].at) / (chart.ticks[-1].at - chart.ticks[0].at)
            assert low + share * (high - low) == pytest.approx(value, abs=0.002)
            assert 0 < mark.x < WIDTH
        assert len(row.name) <= 48
