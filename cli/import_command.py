"""`semisam import`: from what a hospital has to the folder that a site trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from cli.errors import errors, readable_errors

console = Console()


def import_scans(
    source: Annotated[Path, typer.Argument(help="A folder as exported from the PACS, a dataset, or one file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The site's working folder.")],
    labels: Annotated[Path | None, typer.Option(help="Folder (or file) of labels, if they are elsewhere.")] = None,
    plan: Annotated[Path | None, typer.Option(help="The study plan: its classes name and number the labels.")] = None,
    classes: Annotated[str | None, typer.Option(help="Instead of a plan: liver=1,spleen=2.")] = None,
    layout: Annotated[str, typer.Option(help="auto, dicom, paired, nnunet, decathlon, bids or h5.")] = "auto",
    channel: Annotated[
        list[str] | None, typer.Option(help="A channel and what its series is called: flair=FLAIR. Repeatable.")
    ] = None,
    spacing: Annotated[str | None, typer.Option(help="Voxel size in mm, for h5 files: 0.625,0.625,0.625.")] = None,
    partial_labels: Annotated[
        str, typer.Option(help="A label of a part of its scan: refuse the label, or crop the scan.")
    ] = "refuse",
    patient: Annotated[str | None, typer.Option(help="Pattern that finds the patient in a file's name.")] = None,
    key: Annotated[Path | None, typer.Option(help="Key of the pseudonyms; by default the folder's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be taken, and why not the rest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Import scans and labels: one layout, pseudonyms, no identifying headers. The source is never changed.

    Reads DICOM (with SEG and RTSTRUCT), NIfTI, NRRD, MetaImage and h5, also as nnU-Net, Decathlon and BIDS arrange
    them. The folder also gets a site.yaml, the site's settings, unless it has one.
    It can be stopped and started again. What the folder's `private` says must stay at the hospital.

    Example: semisam import /export/atrium -o atrium-scans --plan plan.yaml --dry-run
    """
    with readable_errors("What was imported is kept; the same command goes on."):
        from deployment.site_template import write_for_import
        from intake.choices import Choices
        from intake.importing import Import, check_apart

        choices = Choices.of(plan, classes, channel or [], spacing, partial_labels, patient, labels, key)
        check_apart(source, out)
        with Progress(console=errors, transient=True) as bar:
            task = bar.add_task("looking", total=None)
            listing = choices.find(source, layout, lambda done, total: bar.update(task, completed=done, total=total))
            if dry_run:
                outcomes, site = None, None
            else:
                bar.update(task, description="importing", completed=0, total=len(listing.candidates))
                work = Import(out, choices.settings)
                outcomes = work.run(listing, lambda done, total: bar.update(task, completed=done, total=total))
                done = [each.labeled for each in outcomes if each.state != "failed"]
                site = write_for_import(out, any(done)) if done else None
    from intake.report import as_table, content, next_step

    if as_json:
        console.print_json(json.dumps(content(listing, outcomes)))
    else:
        console.print(as_table(listing, outcomes))
        console.print(next_step(listing, outcomes, out), highlight=False, markup=False, soft_wrap=True)
        if site is not None:
            kept = "" if site[1] else ", which was there and is left as it is"
            console.print(f"The site's settings: {site[0]}{kept}.", highlight=False, markup=False, soft_wrap=True)
    if not listing.candidates or (outcomes and all(each.state == "failed" for each in outcomes)):
        raise typer.Exit(1)
