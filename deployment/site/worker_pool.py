"""Processes that run approved code: one task each, with a time limit, and one warm process in reserve."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from engines.processes import ProcessTree

WORKER = Path(__file__).parent / "worker.py"
TICK_S = 0.1
END_S = 10.0


class OutOfTimeError(Exception):
    """The process exceeded its time limit and was killed."""


class Workers:
    """Starts a process ahead of each task, so that no message waits for imports.

    Args:
        tree: ends every process when the site stops.
        log: file for everything approved code prints.
    """

    def __init__(self, tree: ProcessTree, log: Path) -> None:
        self._tree, self._log = tree, log
        self._spare: subprocess.Popen[bytes] | None = None

    def warm(self) -> None:
        """Make sure a process is waiting for the next task."""
        if self._spare is None:
            self._spare = self._start()

    def run(self, job: Mapping[str, Any], seconds: float, tick: Callable[[], None]) -> bool:
        """Run a task in a process; return whether it exited with status 0.

        Args:
            job: what the process reads, see `worker.work`.
            seconds: time limit.
            tick: called about ten times a second; raising kills the process.

        Raises:
            OutOfTimeError: the process was killed.
        """
        if self._spare is not None and self._spare.poll() is not None:
            self.close()
        self.warm()
        process, self._spare = self._spare, None
        assert process is not None
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write((json.dumps(dict(job)) + "\n").encode())
                process.stdin.flush()
            deadline = time.monotonic() + seconds
            while process.poll() is None:
                tick()
                if time.monotonic() > deadline:
                    raise OutOfTimeError
                time.sleep(TICK_S)
            return process.returncode == 0
        finally:
            _end(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process in reserve."""
        if self._spare is not None:
            _end(self._spare)
            self._spare = None

    def _start(self) -> subprocess.Popen[bytes]:
        # -I: neither the environment nor this project's folders may add to where Python looks for packages.
        # -B: nothing is written beside approved code.
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-B", str(WORKER), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._tree.environment(os.environ),
                cwd=self._log.parent,
                start_new_session=True,
            )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, which share its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
