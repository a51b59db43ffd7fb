"""Tables that stay readable on narrow terminals and in logs."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 100_000


class FittingTable(Table):
    """A table where the console is wide enough for every cell on one line, otherwise a list with one block per row.

    In the list, the first cell of a row is its heading and each further cell is a line `column: cell`. A row with an
    empty first cell belongs to the row above and is indented. Cells are plain text, never markup.

    Args:
        columns: column headings; a line break in one is a space in the list.
        title: shown above.
        caption: shown below.
        numbers_from: position of the first column that is aligned to the right.
    """

    def __init__(self, *columns: str, title: str = "", caption: str = "", numbers_from: int | None = None) -> None:
        super().__init__(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        self._names = [" ".join(column.split()) for column in columns]
        self._title, self._caption = title, caption
        self._lines: list[tuple[str, ...]] = []
        for position, column in enumerate(columns):
            right = numbers_from is not None and position >= numbers_from
            self.add_column(Text(column), justify="right" if right else "left")

    def add(self, *cells: str) -> None:
        """Add a row of plain text, one cell per column."""
        self._lines.append(cells)
        self.add_row(*(Text(cell) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._title:
            yield Text(self._title, style="bold")
        if Measurement.get(console, options.update(width=_UNBOUNDED), self).maximum <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._as_list()
        if self._caption:
            yield Text(self._caption, style="dim")

    def _as_list(self) -> Iterator[Text]:
        for cells in self._lines:
            filled = [(name, cell) for name, cell in zip(self._names, cells, strict=True) if cell]
            indent = "" if cells[0] else "    "
            for number, (name, cell) in enumerate(filled):
                text = f"{indent}{'  ' if number else ''}{name}: {cell}" if name else f"{indent}  {cell}"
                yield Text(text, style="" if number or indent else "bold")
