"""Runs one run of a comparison as a child process, and shows how it stands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console

from engines.monitor import RunMonitor
from engines.processes import ProcessTree
from experiments.comparison.arms import OracleArm
from experiments.comparison.jobs import Job

POLL_S = 0.4

Runner = Callable[[Job], None]


class ChildRunner:
    """Starts `semisam run-in-process` or `run-oracle` for a run and waits for its end; status.json says which it was.

    Args:
        console: where to show.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, job: Job) -> None:
        """Run it, or go on with it. Whatever ends this process, the child ends too."""
        log = job.folder / "log" / "child.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            ProcessTree() as tree,
            RunMonitor(job.title, job.folder, job.storages, self._console) as monitor,
            log.open("ab") as file,
        ):
            process = tree.start(child_command(job), stdout=file, stderr=file)
            while process.poll() is None:
                monitor.tick()
                time.sleep(POLL_S)


def child_command(job: Job) -> list[str]:
    """Return the command line of a run's process."""
    oracle = isinstance(job.arm, OracleArm)
    command = [sys.executable, "-m", "cli.main", "run-oracle" if oracle else "run-in-process"]
    command += ["--plan", str(job.plan_path), "--sites", str(job.sites), "--run-folder", str(job.folder)]
    if isinstance(job.arm, OracleArm):
        command += ["--generalist", job.arm.generalist]
        command += [] if job.arm.clicks is None else ["--clicks", str(job.arm.clicks)]
    return command + (["--only", job.site] if job.site is not None else [])
