"""The distribution of ratings as stacked bars, as in the SemiSAM+ paper. The picture stays at the site."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from client.reviews import Rating, ReviewRecord

SAID = {
    Rating.NO_REVISION: ("1 no revision", "#2b8a5b"),
    Rating.MINOR_REVISION: ("2 minor revision", "#8fc77a"),
    Rating.MAJOR_REVISION: ("3 major revision", "#f0b04a"),
    Rating.REJECT: ("4 reject", "#c8443c"),
}
FORMATS = ("svg", "png")


def rating_counts(records: Iterable[ReviewRecord]) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return (class, model) -> how many pseudo-labels each rating was given to, by every rater's last word on each.

    A model is a run and the round that made the pseudo-label.

    Args:
        records: oldest first.
    """
    last = {(record.rater, record.case, record.pseudo_label): record for record in records}
    counts: dict[tuple[str, str], list[int]] = {}
    for record in last.values():
        model = f"{record.run}, round {'?' if record.round is None else record.round}"
        for name, rating in record.ratings.items():
            counts.setdefault((name, model), [0] * len(Rating))[rating - 1] += 1
    return {key: tuple(counts[key]) for key in sorted(counts)}


def draw_distribution(counts: dict[tuple[str, str], tuple[int, ...]], folder: Path) -> list[Path]:
    """Draw one bar for each class and model, as shares with the counts in them, as SVG and PNG.

    Args:
        counts: as `rating_counts` returns them.
        folder: where to write `ratings.svg` and `ratings.png`.

    Returns:
        The files.

    Raises:
        OSError: they cannot be written.
    """
    figure = Figure(figsize=(max(4.0, 1.5 + 1.1 * len(counts)), 4.2), layout="constrained")
    axes = figure.subplots()
    places, below = range(len(counts)), [0.0] * len(counts)
    for rating, (said, colour) in SAID.items():
        shares = [100 * each[rating - 1] / sum(each) for each in counts.values()]
        bars = axes.bar(places, shares, 0.7, bottom=below, label=said, color=colour)
        numbers = [str(each[rating - 1]) if each[rating - 1] else "" for each in counts.values()]
        axes.bar_label(bars, numbers, label_type="center")
        below = [base + share for base, share in zip(below, shares, strict=True)]
    axes.set_xticks(list(places), [f"{name}\n{model}" for name, model in counts])
    axes.set_ylabel("share of pseudo-labels (%)")
    axes.set_ylim(0, 100)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"ratings.{kind}" for kind in FORMATS]
    for path in files:
        with matplotlib.rc_context({"svg.hashsalt": "ratings", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return files
