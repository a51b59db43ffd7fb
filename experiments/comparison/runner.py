"""Run one job of a comparison in a child process and show its progress."""

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
    """Runs a job as `semisam run-in-process` or `run-oracle` and waits for its end; status.json has the outcome.

    Args:
        console: where progress is printed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, job: Job) -> None:
        """Run or resume a job. The child dies with this process, however that ends."""
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
    """Return the command line of a job's process."""
    oracle = isinstance(job.arm, OracleArm)
    command = [sys.executable, "-m", "cli.main", "run-oracle" if oracle else "run-in-process"]
    command += ["--plan", str(job.plan_path), "--sites", str(job.sites), "--run-folder", str(job.folder)]
    if isinstance(job.arm, OracleArm):
        command += ["--generalist", job.arm.generalist]
        command += [] if job.arm.clicks is None else ["--clicks", str(job.arm.clicks)]
    return command + (["--only", job.site] if job.site is not None else [])
