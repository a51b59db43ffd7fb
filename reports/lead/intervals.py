"""Intervals over single cases: computed where all cases are on one machine, and kept without naming any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from semisam_core.configuration import StrictModel, parse, read_yaml
from semisam_core.files import write_json
from semisam_core.reporting.bootstrap import Estimate, Scores, estimate, paired_difference

FILE = "intervals.json"
FEWEST_CASES = 5  # below, an interval says nothing


class Interval(StrictModel):
    """A mean over cases and its 95% interval; without one if there are fewer than `FEWEST_CASES`."""

    mean: float
    low: float | None
    high: float | None
    cases: int


class Row(StrictModel):
    """Dice at one site, or over the cases of all (`site` is None), of one class, or the mean of all (`target` is None).

    Attributes:
        alone: of the specialist that the site trained alone.
        federated: of the federated one.
        difference: federated minus alone, paired by case.
    """

    site: str | None
    target: str | None
    alone: Interval | None = None
    federated: Interval | None = None
    difference: Interval | None = None


class Intervals(StrictModel):
    """All rows of a run."""

    version: Literal[1] = 1
    rows: tuple[Row, ...]

    def of(self, site: str | None, target: str | None) -> Row:
        """Return a site's row, or that of all sites; an empty one if there is none."""
        known = (row for row in self.rows if (row.site, row.target) == (site, target))
        return next(known, Row(site=site, target=target))


def row_of(site: str | None, target: str | None, alone: Scores, federated: Scores) -> Row:
    """Return the row of these cases' scores.

    Args:
        site: the site, or None for all.
        target: the class, or None for the mean of all.
        alone: (site, case) -> seed -> Dice.
        federated: likewise.
    """
    found = (estimate(alone), estimate(federated), paired_difference(federated, alone))
    return Row(
        site=site,
        target=target,
        alone=_interval(found[0]),
        federated=_interval(found[1]),
        difference=_interval(found[2]),
    )


def write_intervals(folder: Path, intervals: Intervals) -> None:
    """Write the intervals into a run folder."""
    write_json(folder / FILE, intervals.model_dump())


def read_intervals(folder: Path) -> Intervals:
    """Return a run folder's intervals; no rows if it has none, as across hospitals.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / FILE
    return parse(Intervals, read_yaml(path), str(path)) if path.exists() else Intervals(rows=())


def _interval(found: Estimate | None) -> Interval | None:
    if found is None:
        return None
    enough = found.cases >= FEWEST_CASES
    return Interval(
        mean=found.mean, low=found.low if enough else None, high=found.high if enough else None, cases=found.cases
    )
