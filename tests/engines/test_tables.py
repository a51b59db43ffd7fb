"""Tables at the widths that terminals and logs have: whole cells on one line each, or a list, never shreds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engines.results import SiteResult, results_table
from engines.tables import FittingTable

SITES = ("charite", "site-with-quite-a-long-name")


def _table() -> FittingTable:
    table = FittingTable("site", "Dice\nlocal", "HD95 mm", "generalists", title="Study [atrium]", numbers_from=1)
    table.add(SITES[0], "0.891 [0.801, 0.922]", "8.1", "lite-medsam, sam, sam-med3d")
    table.add("", "0.1", "", "")
    table.add(SITES[1], "0.862 [0.701, 0.912]", "11.9", "[none]")
    return table


def _shown(width: int, terminal: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    console.print(_table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [100, 200])
def test_a_wide_console_shows_a_table_with_a_line_per_row(width: int, terminal: bool) -> None:
    lines = _shown(width, terminal)
    assert lines[0] == "Study [atrium]"
    assert len(lines) == 1 + 2 + 1 + 3  # title, two lines of headings, a rule, three rows
    row = next(line for line in lines if SITES[1] in line)
    assert row.split("  ")[0] == SITES[1]
    assert "0.862 [0.701, 0.912]" in row
    assert row.rstrip().endswith("[none]")  # not taken for markup


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_console_shows_a_list_with_every_value_on_its_line(width: int, terminal: bool) -> None:
    assert [line.rstrip() for line in _shown(width, terminal)] == [
        "Study [atrium]",
        f"site: {SITES[0]}",
        "  Dice local: 0.891 [0.801, 0.922]",
        "  HD95 mm: 8.1",
        "  generalists: lite-medsam, sam, sam-med3d",
        "    Dice local: 0.1",
        f"site: {SITES[1]}",
        "  Dice local: 0.862 [0.701, 0.912]",
        "  HD95 mm: 11.9",
        "  generalists: [none]",
    ]


def test_the_table_is_used_exactly_as_soon_as_it_fits() -> None:
    needed = max(len(line.rstrip()) for line in _shown(200))
    assert len(_shown(needed)) == 7
    assert "  HD95 mm: 8.1" in [line.rstrip() for line in _shown(needed - 1)]


def _result(site: str, missing: int = 0) -> SiteResult:
    return SiteResult(site, "left-atrium", 4, 16, 2, 0, 12, 4, 0.403, 35.8, 0.863, 8.6, missing)


def test_the_results_of_a_study_fit_a_terminal_of_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table([_result("site-a"), _result("site-b")], "left-atrium, run-1", "last round"))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    row = next(line for line in lines if line.startswith("site-b"))
    assert " ".join(row.split()) == "site-b left-atrium 4 / 16 12 / 4 0.403 / 0.863 35.8 / 8.6"


def test_the_results_of_a_study_are_a_list_where_they_do_not_fit() -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(results_table([_result("site-a", missing=2)], "left-atrium, run-1", "last round"))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert "  Dice local / federated: 0.403 / 0.863" in lines
    assert "  HD95 mm local / federated: 35.8 / 8.6 (2 missing)" in lines
