"""Write the demo's phantom hospitals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from semisam_core.data.phantom import DEMO_SCANNERS, LABELED_ORGANS, write_phantom_site
from semisam_core.files import write_json
from semisam_core.paths import writable_folder


def write_hospitals(out: Path, cases: int, seed: int, console: Console) -> bool:
    """Write scans for each demo hospital, with labels of every organ, unless the same ones are there already.

    Args:
        out: folder of the hospitals.
        cases: scans per hospital.
        seed: seed of the first hospital; each further one adds one.
        console: where progress is shown.

    Returns:
        Whether anything was written.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    out = writable_folder(out, "--out")
    marker = out / "phantom.json"
    recipe = {"cases": cases, "seed": seed, "labels": {name: k for k, name in enumerate(LABELED_ORGANS, start=1)}}
    if _read(marker) == recipe:
        return False
    with Progress(console=console) as progress:

        def show(task: TaskID, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        for number, (name, scanner) in enumerate(sorted(DEMO_SCANNERS.items())):
            shown = partial(show, progress.add_task(f"phantom hospital {name}", total=cases))
            write_phantom_site(out / name, scanner, cases, seed + number, name, LABELED_ORGANS, shown)
    write_json(marker, recipe)
    return True


def _read(marker: Path) -> object:
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
