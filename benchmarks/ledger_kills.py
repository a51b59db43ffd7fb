"""Kill a process that books and spends privacy at random moments: no less is ever booked than was spent.

PYTHONPATH=. python benchmarks/ledger_kills.py --kills 50       two minutes on a core of its own
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.client.test_privacy_ledger import killed_at_random


def main() -> None:
    """Kill so many times, and print how much more was booked than spent at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        more = killed_at_random(Path(folder), options.kills, random.Random(options.seed))
        steps = (Path(folder) / "steps").stat().st_size
    print(f"{options.kills} kills: {steps} steps were taken, {steps + more} are booked, the ledger reads without error")


if __name__ == "__main__":
    main()
