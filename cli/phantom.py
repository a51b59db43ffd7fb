"""Write the demo's phantom hospitals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from semisam_core.data.phantom import DEMO_SCANNERS, LABELED_ORGANS, write_phantom_site
from semisam_core.files import write_json


def write_hospitals(out: Path, cases: int, seed: int, console: Console) -> None:
    """Write `cases` scans for each demo hospital, every organ labeled, unless the same ones are there already."""
    marker = out / "phantom.json"
    recipe = {"cases": cases, "seed": seed, "labels": {name: k for k, name in enumerate(LABELED_ORGANS, start=1)}}
    if marker.exists() and "".join(marker.read_text().split()) == "".join(json.dumps(recipe, sort_keys=True).split()):
        console.print(f"The phantom hospitals are already in {out}.", highlight=False)
        return
    with Progress(console=console) as progress:
        for number, (name, scanner) in enumerate(sorted(DEMO_SCANNERS.items())):
            task = progress.add_task(f"phantom hospital {name}", total=cases)
            advance = partial(_show, progress, task)
            write_phantom_site(out / name, scanner, cases, seed + number, name, LABELED_ORGANS, advance)
    write_json(marker, recipe)


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)
