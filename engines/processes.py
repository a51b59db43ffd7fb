"""Child processes that never outlive this one, however deep the tree and however this process ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import psutil

MARK = "SEMISAM_PROCESS_TREE"
GRACE_S = 5.0


class ProcessTree:
    """Starts processes and, on leaving the `with` block, ends them and all their descendants, detached or not.

    Every child carries a mark in its environment. Its own children inherit it even if they start a new session or lose
    their parent, so the mark finds them all. Inside the `with` block, SIGTERM and SIGHUP act like Ctrl-C.

    Args:
        mark: the mark of a tree that another process started, to find and end it; a new one by default.
    """

    def __init__(self, mark: str | None = None) -> None:
        self._mark = secrets.token_hex(8) if mark is None else mark
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> ProcessTree:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, _interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        quiet = threading.current_thread() is threading.main_thread()
        # A second Ctrl-C must not interrupt the clean-up.
        impatient = signal.signal(signal.SIGINT, signal.SIG_IGN) if quiet else None
        try:
            self.end()
        finally:
            if quiet:
                signal.signal(signal.SIGINT, impatient)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def mark(self) -> str:
        """The value by which this tree's processes are found."""
        return self._mark

    def start(
        self,
        command: Sequence[str],
        stdout: IO[bytes],
        stderr: IO[bytes],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process with this tree's mark, in its own session, so that Ctrl-C reaches it only through us."""
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=self.environment(env),
            cwd=cwd,
            start_new_session=True,
        )

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return an environment that carries this tree's mark."""
        return dict(os.environ if env is None else env) | {MARK: self._mark}

    def alive(self) -> list[psutil.Process]:
        """Return all living processes of this tree."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def end(self) -> None:
        """Terminate every process of the tree, then kill those that remain."""
        processes = self.alive()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(processes, timeout=GRACE_S)
        deadline = time.monotonic() + GRACE_S
        while (processes := self.alive()) and time.monotonic() < deadline:
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=0.5)


def birth(process: psutil.Process) -> str:
    """Return what tells a process from every other that had or will have its number.

    It counts from this machine's start, not by the clock, which may be set while the process lives.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {process.create_time() - psutil.boot_time():.2f}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
