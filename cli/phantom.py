"""Write the demo's phantom hospitals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from semisam_core.data.phantom import DEMO_SCANNERS, write_phantom_site
from semisam_core.files import write_json


def write_hospitals(out: Path, cases: int, seed: int, console: Console) -> None:
    """Write `cases` scans for each demo hospital, unless the same ones are there already."""
    marker = out / "phantom.json"
    recipe = f'{{"cases": {cases}, "seed": {seed}}}'
    if marker.exists() and "".join(marker.read_text().split()) == "".join(recipe.split()):
        console.print(f"The phantom hospitals are already in {out}.", highlight=False)
        return
    with Progress(console=console) as progress:
        for number, (name, scanner) in enumerate(sorted(DEMO_SCANNERS.items())):
            task = progress.add_task(f"phantom hospital {name}", total=cases)
            advance = partial(_show, progress, task)
            write_phantom_site(out / name, scanner, cases, seed + number, name, progress=advance)
    write_json(marker, {"cases": cases, "seed": seed})


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)
