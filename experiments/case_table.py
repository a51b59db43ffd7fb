"""The CSV that assigns cases to sites, as spreadsheets write it: any common delimiter, UTF-8 or UTF-16."""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from semisam_core.errors import ConfigError

COLUMNS = ("case", "site", "split")
SPLITS = ("train", "val")
DELIMITERS = (",", ";", "\t", "|")
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class CaseRow:
    """One line of the table: a case, the site it belongs to, and `train` or `val`."""

    case: str
    site: str
    split: str


def read_case_table(path: Path) -> list[CaseRow]:
    """Read a CSV with the columns case, site and split.

    Columns may stand in any order among others and be capitalized; commas, semicolons, tabs and bars separate cells;
    spaces around cells do not count. The file is UTF-8 or UTF-16, with or without a byte-order mark for UTF-8.

    Raises:
        ConfigError: the file cannot be read or decoded, a column or cell is missing, a split is unknown, or a case is
            listed twice. The message names the line.
    """
    numbered = _rows(_decoded(path), path)
    _, header = next(numbered, (0, []))
    columns = _columns(header, path)
    rows: list[CaseRow] = []
    seen: dict[str, int] = {}
    for number, cells in numbered:
        if not any(cells):
            continue  # spreadsheets end their files with empty rows
        row = _row(cells, columns, len(header), f"--table {path}: line {number}")
        if row.case in seen:
            raise ConfigError(
                f"--table {path}: line {number}: the case {row.case} is listed twice (first on line {seen[row.case]})."
            )
        seen[row.case] = number
        rows.append(row)
    if not rows:
        raise ConfigError(f"--table {path}: the table has a header but no rows.")
    return rows


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--table {path}: the file cannot be read ({error.strerror}).") from None
    encoding = "utf-16" if content.startswith(UTF_16_MARKS) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"--table {path}: line {line}: the text is not {encoding.removesuffix('-sig').upper()}. Save the table as "
            "UTF-8 (spreadsheets call it CSV UTF-8)."
        ) from None
    if "\0" in text:
        raise ConfigError(f"--table {path}: the file holds null characters, so it is no UTF-8 text. Save it as UTF-8.")
    return unicodedata.normalize("NFC", text)


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and stripped cells, the header first."""
    lines = list(io.StringIO(text, newline=""))  # str.splitlines also splits at control characters
    skipped = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    lines = lines[skipped:]
    if not lines:
        return
    # The delimiter is the one that takes the header apart; cells may hold the others.
    delimiter = max(DELIMITERS, key=lambda each: len(_named(next(csv.reader(lines[:1], delimiter=each)))))
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        for cells in reader:
            yield skipped + reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ConfigError(
            f"--table {path}: line {skipped + reader.line_num}: this is not valid CSV ({error})."
        ) from None


def _named(cells: Sequence[str]) -> list[str]:
    """Return the required columns among header cells."""
    return [name for cell in cells if (name := cell.strip().strip('"').casefold()) in COLUMNS]


def _columns(header: Sequence[str], path: Path) -> dict[str, int]:
    """Return the position of each required column."""
    names = [cell.casefold() for cell in header]
    for column in COLUMNS:
        if names.count(column) != 1:
            found = "is missing" if column not in names else "is there twice"
            raise ConfigError(
                f"--table {path}: the column {column} {found}; the first line must name the columns "
                f"{', '.join(COLUMNS)}, separated by commas, semicolons or tabs. "
                f"Found: {', '.join(header) or 'nothing'}."
            )
    return {column: names.index(column) for column in COLUMNS}


def _row(cells: Sequence[str], columns: dict[str, int], width: int, where: str) -> CaseRow:
    if len(cells) > width and any(cells[width:]):
        raise ConfigError(
            f"{where}: {len(cells)} cells, but the header has {width}. Quote a name that contains the delimiter."
        )
    values = {column: cells[position] if position < len(cells) else "" for column, position in columns.items()}
    if empty := [column for column, value in values.items() if not value]:
        raise ConfigError(f"{where}: no value for {', '.join(empty)}.")
    if values["split"].casefold() not in SPLITS:
        raise ConfigError(f"{where}: split = {values['split']!r}; accepted: {', '.join(SPLITS)}.")
    return CaseRow(values["case"], values["site"], values["split"].casefold())
