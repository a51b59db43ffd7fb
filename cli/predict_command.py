"""`semisam predict`: a trained specialist on new scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from cli.errors import errors, readable_errors

console = Console()


def predict(
    model: Annotated[Path, typer.Argument(help="A run folder, a checkpoint in it, or an exported package.")],
    scans: Annotated[
        Path, typer.Argument(help="A file (volume or multi-frame DICOM), a DICOM folder, a folder of scans, a dataset.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the outputs.")],
    also: Annotated[list[Path] | None, typer.Option(help="Another model: the mean of all is used. Repeatable.")] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="auto (as the input), nifti, dicom-seg or both.")
    ] = "auto",
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write maps of it, from 0 to 1.")] = False,
    channel: Annotated[
        list[str] | None, typer.Option(help="A channel and what its series is called: flair=FLAIR. Repeatable.")
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, dicom, paired, nnunet, decathlon, bids or h5.")] = "auto",
    spacing: Annotated[str | None, typer.Option(help="Voxel size in mm, for h5 files: 0.625,0.625,0.625.")] = None,
    layers: Annotated[Path | None, typer.Option(help="A site's own layers, for models that lack them.")] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Memory that one scan may take; by default 80 % of what is free.", min=0.1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<number>.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all by default.", min=1, max=1024)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Segment scans with a trained specialist alone; no generalist and no server is needed.

    Outputs lie in the geometry of their scan, and are named after it: they stay at the hospital. A DICOM SEG carries
    the patient's attributes, as a PACS needs. What is done is kept; the same command goes on. A scan that fails stops
    no other; the exit status is 1 if any failed or there was none. Research software, not a medical device.

    Example: semisam predict runs/atrium scans/ -o segmented
    """
    with (
        readable_errors("What was segmented is kept; the same command goes on."),
        Progress(console=errors, transient=True) as bar,
    ):
        from intake.choices import channel_patterns, spacing_of
        from release.inputs import find_inputs
        from release.memory import free_gb
        from release.model import load_model
        from release.predicting import Order, as_table, predict_all
        from release.prediction import Predictor
        from release.runtime import use

        task = bar.add_task("loading", total=None)
        place = use(device, threads)
        predictor = Predictor([load_model(path, layers) for path in (model, *(also or []))], place)
        order = Order(out, file_format, uncertainty, spacing_of(spacing), memory_gb or free_gb())
        inputs, listing = find_inputs(
            scans,
            predictor.plan,
            layout,
            channel_patterns(channel or []),
            lambda done, total: bar.update(task, description="looking", completed=done, total=total),
        )
        records = predict_all(
            predictor,
            inputs,
            order,
            lambda done, total: bar.update(task, description="segmenting", completed=done, total=total),
        )
    if as_json:
        left_out = [{"what": what, "reason": reason} for what, reason in listing.left_out]
        console.print_json(json.dumps({"scans": records, "left_out": left_out}))
    else:
        console.print(as_table(records, listing.left_out))
    if not records or any(each["state"] == "failed" for each in records):
        raise typer.Exit(1)
