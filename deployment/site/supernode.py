"""Flower's SuperNode in a process that ends when it has lost the server for good, or its supervisor.

Flower's own command goes on serving its Runtime API when the connection's loop has ended, and looks alive.
"""

from __future__ import annotations

import os
import sys
import threading
import time


def main() -> None:
    """Run the SuperNode with this process's arguments, of which the first is the supervisor's process number."""
    # Asked for now, the parent might be another already: a supervisor may die before this line.
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
