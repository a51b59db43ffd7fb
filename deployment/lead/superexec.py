"""Flower's SuperExec, which starts each run's ServerApp, in a process that reaps the ones that have ended.

Flower's own command does not wait for the programs it starts, so each stays a zombie until the next one starts.

Like superlink.py, this file runs as a program and imports nothing of this project.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the SuperExec with this process's arguments."""
    signal.signal(signal.SIGCHLD, _reap)
    from flwr.supercore.cli.flower_superexec import flower_superexec

    flower_superexec()


def _reap(number: int, frame: FrameType | None) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
