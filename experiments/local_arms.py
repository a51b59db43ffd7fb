"""The local baselines of a study: each labeled site trained alone, in a child process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console

from client.site_config import SiteConfig
from engines.monitor import RunMonitor
from engines.processes import ProcessTree
from engines.run_state import run_reason, run_state
from semisam_core.plan import Plan, write_plan

POLL_S = 0.4
LEAST_URGENT = 19  # the study goes first


@dataclass
class _Arm:
    config: SiteConfig
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.config.site} alone"


class LocalArms:
    """Trains sites alone, one after another, beside whatever else goes on.

    Args:
        plan: the study's plan; the arms follow it supervised, with the same steps and seed.
        sites: folder of site files.
        folder: where the arms' runs are.
        labeled: the sites that have labels. Those that have completed already are left out.
        console: where to print.
    """

    def __init__(self, plan: Plan, sites: Path, folder: Path, labeled: Sequence[SiteConfig], console: Console) -> None:
        self._sites, self._folder, self._console = sites, folder, console
        arms = (_Arm(config, folder / config.site) for config in labeled)
        self._waiting = [arm for arm in arms if run_state(arm.folder) != "completed"]
        self._current: tuple[_Arm, subprocess.Popen[bytes]] | None = None
        self._tree = ProcessTree()
        if self._waiting:
            write_plan(folder / "plan.yaml", supervised_alone(plan))

    @property
    def mark(self) -> str:
        """The mark of its processes, see `ProcessTree`."""
        return self._tree.mark

    def __enter__(self) -> LocalArms:
        self._tree.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tree.__exit__(kind, error, trace)

    def advance(self) -> None:
        """Start the next arm if none is running."""
        if self._current is not None:
            arm, process = self._current
            if process.poll() is None:
                return
            self._current = None
            if run_state(arm.folder) != "completed":
                self._say(f"{arm.title} did not complete: {run_reason(arm.folder)}")
        if self._waiting:
            arm = self._waiting.pop(0)
            self._current = arm, self._start(arm)

    def finish(self) -> None:
        """Run all arms that are left, and show them."""
        self.advance()
        while self._current is not None:
            arm, process = self._current
            storages = {arm.config.site: arm.config.storage.folder}
            with RunMonitor(arm.title, arm.folder, storages, self._console) as monitor:
                while process.poll() is None:
                    monitor.tick()
                    time.sleep(POLL_S)
            self.advance()

    def _start(self, arm: _Arm) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cli.main", "run-in-process", "--plan", str(self._folder / "plan.yaml")]
        command += ["--sites", str(self._sites), "--run-folder", str(arm.folder), "--only", arm.config.site]
        log = self._folder / f"{arm.config.site}.log"
        with log.open("ab") as file:
            process = self._tree.start(command, stdout=file, stderr=file)
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, LEAST_URGENT)
        return process

    def _say(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False, markup=False)


def supervised_alone(plan: Plan) -> Plan:
    """Return the plan of the local baseline: supervised, with the same steps and seed, for one site."""
    return plan.alone().model_copy(
        update={
            "regularizer": plan.regularizer.model_copy(update={"name": "none"}),
            "pseudo_labels": None,
        }
    )
