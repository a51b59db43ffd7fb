"""Charts in the units of an SVG; the page's macros draw them. Small enough that text stays legible on a telephone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 54, 330, 10, 150
ROW, NAME_LENGTH, MOST_TICKS = 34, 48, 8
STYLES = ("a", "b", "c")

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what stands there."""

    at: float
    words: str


@dataclass(frozen=True)
class Line:
    """One series: a solid or dashed style, and its pieces between gaps."""

    style: str
    pieces: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True)
class LineChart:
    """Values over rounds.

    Attributes:
        title: shown above.
        alt: what a reader who cannot see it is told.
        lines: the series.
        along: ticks of the rounds.
        across: ticks of the values.
    """

    title: str
    alt: str
    lines: tuple[Line, ...]
    along: tuple[Tick, ...]
    across: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


@dataclass(frozen=True)
class Part:
    """One piece of a stacked bar."""

    style: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class BarChart:
    """Stacked bars over rounds; attributes as in `LineChart`."""

    title: str
    alt: str
    parts: tuple[Part, ...]
    along: tuple[Tick, ...]
    across: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


@dataclass(frozen=True)
class Value:
    """A share in [0, 1], and its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A value as a dot, with a whisker for its interval."""

    style: str
    x: float
    y: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairRow:
    """What is compared in one row: up to two dots."""

    name: str
    y: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class PairChart:
    """Rows of two dots each on one scale, which need not begin at 0."""

    title: str
    alt: str
    rows: tuple[PairRow, ...]
    ticks: tuple[Tick, ...]
    height: int
    bottom: int
    width: int = WIDTH
    left: int = 4


def line_chart(title: str, alt: str, series: Sequence[Mapping[int, float | None]], rounds: int) -> LineChart:
    """Return a chart of shares in [0, 1] over rounds. A round that is None or absent is a gap.

    Args:
        title: shown above.
        alt: the chart in words.
        series: at most two; the second is dashed.
        rounds: the last round of the axis.
    """
    lines = tuple(Line(STYLES[k], _pieces(values, rounds)) for k, values in enumerate(series))
    across = tuple(Tick(_y(share), f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    return LineChart(title, alt, lines, _rounds(rounds), across)


def bar_chart(title: str, alt: str, columns: Mapping[int, Sequence[float]], rounds: int, shares: bool) -> BarChart:
    """Return stacked bars over rounds.

    Args:
        title: shown above.
        alt: the chart in words.
        columns: round -> up to three numbers, from below upwards.
        rounds: the last round of the axis.
        shares: whether each bar shows shares of its sum, in percent.
    """
    top = 1.0 if shares else max((sum(each) for each in columns.values()), default=0.0) or 1.0
    step = (RIGHT - LEFT) / max(rounds, 1)
    width = round(max(min(step * 0.7, 40.0), 1.0), 1)
    parts = []
    for number, values in columns.items():
        total = (sum(values) or 1.0) if shares else 1.0
        below = 0.0
        for style, value in zip(STYLES, values, strict=False):
            share = value / total / top
            if share > 0:
                high, low = _y(below + share), _y(below)
                parts.append(Part(style, round(_x(number, rounds) - width / 2, 1), high, width, round(low - high, 1)))
            below += share
    words = ("0", "50 %", "100 %") if shares else ("0", f"{top / 2:g}", f"{top:g}")
    across = tuple(Tick(_y(k / 2), each) for k, each in enumerate(words))
    return BarChart(title, alt, tuple(parts), _rounds(rounds), across)


def pair_chart(title: str, alt: str, rows: Sequence[tuple[str, Value | None, Value | None]]) -> PairChart:
    """Return rows of (name, first, second): the first a filled dot, the second an open one."""
    drawn = []
    shown = [value for _, *pair in rows for value in pair if value is not None]
    low, high = _span([end for each in shown for end in (each.value, each.low, each.high) if end is not None])
    for k, (name, first, second) in enumerate(rows):
        y = 24.0 + ROW * k
        marks = [_mark("b", second, y + 3, low, high), _mark("a", first, y - 3, low, high)]
        name = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
        drawn.append(PairRow(name, y, tuple(each for each in marks if each is not None)))
    bottom = 10 + ROW * len(rows)
    ticks = tuple(Tick(_along(k / 4), f"{low + (high - low) * k / 4:.3g}") for k in range(5))
    return PairChart(title, alt, tuple(drawn), ticks, bottom + 26, bottom)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return an axis in tenths around all values, at least two tenths long and within [0, 1]."""
    low = min(math.floor(10 * min(values, default=0.0)), 8)
    high = max(math.ceil(10 * max(values, default=1.0)), low + 2)
    return max(low, 0) / 10, min(high, 10) / 10


def _mark(style: str, value: Value | None, y: float, low: float, high: float) -> Mark | None:
    if value is None:
        return None
    x, start, end = (
        None if each is None else _along((each - low) / (high - low)) for each in (value.value, value.low, value.high)
    )
    return None if x is None else Mark(style, x, y, start, end)


def _along(share: float) -> float:
    return round(12 + (WIDTH - 24) * min(max(share, 0.0), 1.0), 1)


def _pieces(values: Mapping[int, float | None], rounds: int) -> tuple[tuple[Point, ...], ...]:
    pieces: list[list[Point]] = [[]]
    for number in sorted(values):
        value = values[number]
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((_x(number, rounds), _y(min(max(value, 0.0), 1.0))))
    return tuple(tuple(piece) for piece in pieces if piece)


def _x(number: int, rounds: int) -> float:
    return round(LEFT + (RIGHT - LEFT) * (number - 0.5) / max(rounds, 1), 1)


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)


def _rounds(rounds: int) -> tuple[Tick, ...]:
    step = max(1, -(-rounds // MOST_TICKS))
    return tuple(Tick(_x(number, rounds), str(number)) for number in range(1, rounds + 1, step))
