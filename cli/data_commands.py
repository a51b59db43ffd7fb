"""`semisam data ...`: what a hospital does with its data before it joins a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import errors, readable_errors

app = typer.Typer(no_args_is_help=True, help="A hospital's data, before it joins a study.")
console = Console()


@app.command()
def check(
    site: Annotated[Path, typer.Argument(help="The site's YAML.")],
    plan: Annotated[
        Path | None, typer.Option(help="The study plan; without it, what only a plan can say is left.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The report; data-check.html in the site's storage by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Read every scan and label of a site and report what is wrong with them. The exit status is 1 if something is.

    Example: semisam data check north/site.yaml --plan plan.yaml
    """
    from rich.progress import Progress

    with readable_errors():
        from client.site_config import load_site_config
        from intake.check.examine import check_site_data
        from intake.check.report import REPORT, write_report
        from intake.check.view import print_check
        from semisam_core.paths import absolute_path
        from semisam_core.plan import load_plan

        config = load_site_config(site)
        path = absolute_path(out, "--out") if out is not None else config.storage.folder / REPORT
        study = load_plan(plan) if plan is not None else None
        with Progress(console=errors, transient=True) as bar:
            task = bar.add_task("reading scans")
            found = check_site_data(config, study, lambda done, total: bar.update(task, completed=done, total=total))
        write_report(found, path)
        if as_json:
            typer.echo(json.dumps(found.as_json() | {"report": str(path)}, indent=2))
        else:
            print_check(found, path, console)
    if not found.sound:
        raise typer.Exit(1)
