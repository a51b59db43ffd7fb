"""`semisam site audit ...`: whether the record of what left is whole, and a copy for a data-protection officer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import readable_errors

app = typer.Typer(no_args_is_help=True, help="The record of what left this site: check it, export it.")
console = Console()

FolderOption = Annotated[Path, typer.Option("--folder", help="The site's folder, created by `semisam site init`.")]
SealOption = Annotated[str | None, typer.Option(help="The seal that an earlier check printed.")]


@app.command()
def verify(folder: FolderOption = Path(), seal: SealOption = None) -> None:
    """Check that no line of the audit log was changed, removed, added or moved. The exit status is 1 if one was.

    Example: semisam site audit verify --folder atrium-north
    """
    with readable_errors():
        from client.audit_check import check_log
        from deployment.site.audit_export import said_of
        from deployment.site.site_folder import SiteFolder, audit_log

        check = check_log(audit_log(SiteFolder.at(folder).config()), seal)
        _say(said_of(check))
    if check.problems:
        raise typer.Exit(1)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to create.")],
    folder: FolderOption = Path(),
    seal: SealOption = None,
) -> None:
    """Check the audit log and write it to a folder as JSON, CSV and a summary to read, without reasons of refusals.

    Example: semisam site audit export --folder atrium-north --out audit-2026-03
    """
    with readable_errors():
        from deployment.site.audit_export import export_log, said_of
        from deployment.site.site_folder import SiteFolder, audit_log

        config = SiteFolder.at(folder).config()
        check = export_log(audit_log(config), config.site, out, seal)
        _say([*said_of(check), f"{out}: audit.json, audit.csv, summary.txt"])
    if check.problems:
        raise typer.Exit(1)


def _say(sentences: list[str]) -> None:
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
