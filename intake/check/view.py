"""What a data check found, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from intake.check.examine import DataCheck
from semisam_core.text import printable


def print_check(found: DataCheck, report: Path, console: Console) -> None:
    """Print the findings, what was not done and why, the counts, and where the report is."""
    table = Table("case", "severity", "check", "found", title=f"Data check of {found.site}")
    for finding in found.findings:
        said = (finding.case or "(site)", finding.severity.value, finding.check, finding.sentence)
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in said))
    if found.findings:
        console.print(table)
    for reason, names in found.reasons_not_done().items():
        console.print(f"Not done: {', '.join(names)} ({reason}).", markup=False, highlight=False, soft_wrap=True)
    counts = ", ".join(f"{number} {name}" for name, number in found.counts().items())
    console.print(f"{counts}.", markup=False, highlight=False, soft_wrap=True)
    console.print(f"The report stays at this site: {report}", markup=False, highlight=False, soft_wrap=True)
