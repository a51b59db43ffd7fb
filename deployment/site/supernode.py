"""Flower's SuperNode in a process that exits when it gives up on the server or its supervisor dies.

Flower's own command keeps serving its Runtime API after its connection loop has ended, and so looks alive.
"""

from __future__ import annotations

import os
import sys
import threading
import time


def main() -> None:
    """Run the SuperNode with this process's arguments; the first is the supervisor's process number."""
    # Passed as an argument, since the supervisor may have died before this line and the parent be another process.
    threading.Thread(target=_end_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    from flwr.supernode.cli.flower_supernode import flower_supernode

    flower_supernode()
    os._exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
