"""Seconds and bytes of a deployed round over lines like those of hospitals: real processes, TLS, a delay, a throughput.

Each hospital reaches the server over a line of its own that delays and throttles. The rounds of each plan are compared
with those of the same plan over lines that do neither.

    python benchmarks/wire.py --round-trip-ms 50 --mbit 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from semisam_core.plan import Plan
from tests.conftest import tiny_plan
from tests.deployment.deployment import Deployment, Run

LOOPBACK = "127.0.0.1"
PIECE = 16 * 1024
RUN_S = 900.0
# A specialist of 1 MB that trains two steps a round, so that a round is mostly what travels.
PLAN = (
    "pseudo_labels=null",
    "regularizer.name=none",
    "specialist.arguments.channels=[16, 32, 64]",
    "specialist.arguments.strides=[2, 2]",
    "specialist.arguments.residual_units=2",
    "evaluation.every_rounds=100",
    "aggregation.minimum_sites=3",
    "aggregation.join_deadline_s=300",
    "aggregation.round_deadline_s=300",
)


class HospitalLine:
    """A line to the server that delays and throttles each direction.

    Args:
        target: the server's port.
        round_trip_s: what a byte and its answer take longer than without the line.
        bytes_per_s: throughput of each direction; infinite for no limit.
    """

    def __init__(self, target: int, round_trip_s: float, bytes_per_s: float) -> None:
        self._target, self._delay_s, self._rate = target, round_trip_s / 2, bytes_per_s
        self.up = self.down = 0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    @property
    def address(self) -> str:
        """The server's address over this line."""
        return f"{LOOPBACK}:{self.port}"

    def close(self) -> None:
        """Cut all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _serve(self, ready: threading.Event) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._carry, LOOPBACK, 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()

    async def _carry(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self._delay_s)  # the connection's own handshake
        with contextlib.suppress(OSError):
            far, far_out = await asyncio.open_connection(LOOPBACK, self._target)
            await asyncio.gather(self._pump(near, far_out, up=True), self._pump(far, near_out, up=False))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, up: bool) -> None:
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)
        delivery = asyncio.create_task(self._deliver(on_its_way, target))
        free = 0.0  # when the line has sent everything before
        with contextlib.suppress(OSError):
            while piece := await source.read(PIECE):
                free = max(free, self._loop.time()) + len(piece) / self._rate
                if up:
                    self.up += len(piece)
                else:
                    self.down += len(piece)
                await on_its_way.put((free + self._delay_s, piece))
        await on_its_way.put((free + self._delay_s, b""))
        await delivery

    async def _deliver(self, on_its_way: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, piece = await on_its_way.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if not piece:
                    break
                target.write(piece)
                await target.drain()
        target.close()


@dataclass(frozen=True)
class Rounds:
    """What the later rounds of one run took.

    Attributes:
        seconds: of each round.
        up: bytes that a site sent, a round.
        down: bytes that a site received, a round.
    """

    seconds: list[float]
    up: float
    down: float


class _Deployment(Deployment):
    """A deployment whose hospitals all reach the server over lines of their own."""

    def __init__(self, folder: Path, plan: Plan, round_trip_s: float, bytes_per_s: float) -> None:
        super().__init__(folder, plan)
        self.lines = {name: HospitalLine(self.port, round_trip_s, bytes_per_s) for name in self.hospitals}

    def start_sites(self) -> None:
        """Start the hospitals over their lines."""
        for name, site in self.hospitals.items():
            site.connect_by(self.lines[name])  # type: ignore[arg-type]
        super().start_sites()


@contextlib.contextmanager
def _deployed(folder: Path, plan: Plan, round_trip_s: float, bytes_per_s: float) -> Iterator[_Deployment]:
    deployment = _Deployment(folder, plan, round_trip_s, bytes_per_s)
    try:
        deployment.set_up()
        yield deployment
    finally:
        deployment.end()
        for line in deployment.lines.values():
            line.close()


def measure(folder: Path, plan: Plan, round_trip_s: float, bytes_per_s: float) -> Rounds:
    """Run a deployed study and return what all its rounds but the first took."""
    with _deployed(folder, plan, round_trip_s, bytes_per_s) as deployment:
        deployment.lead("run", seconds=RUN_S)
        run = Run(deployment.run_folder)
        seconds = [line["seconds"] for line in run.events("aggregated")][1:]
        rounds, sites = plan.training.rounds, len(deployment.lines)
        up = sum(line.up for line in deployment.lines.values()) / rounds / sites
        down = sum(line.down for line in deployment.lines.values()) / rounds / sites
    return Rounds(seconds, up, down)


def main() -> None:
    """Print seconds and bytes of a round for each codec, over both kinds of line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-trip-ms", type=float, default=50.0)
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--codecs", default="null,int8", help="null or names, separated by commas")
    arguments = parser.parse_args()
    table = Table("codec", "line", "seconds a round, median", "kB up", "kB down", title="a deployed round, 3 sites")
    for codec in arguments.codecs.split(","):
        more = () if codec == "null" else (f"aggregation.codec={{name: {codec}}}",)
        plan = tiny_plan(*PLAN, f"training.rounds={arguments.rounds}", *more)
        for words, delay_s, rate in (
            ("no delay, no limit", 0.0, float("inf")),
            (
                f"{arguments.round_trip_ms:g} ms, {arguments.mbit:g} Mbit/s",
                arguments.round_trip_ms / 1e3,
                arguments.mbit * 125_000,
            ),
        ):
            with tempfile.TemporaryDirectory() as folder:
                found = measure(Path(folder), plan, delay_s, rate)
            middle = f"{statistics.median(found.seconds):.2f}"
            table.add_row(codec, words, middle, f"{found.up / 1e3:.0f}", f"{found.down / 1e3:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
