"""A Flower run in simulation, with a private SuperLink that ends with the run, and a reliable outcome.

Flower's own command starts a detached SuperLink, returns 0 whatever happened and leaves processes behind. Here the
SuperLink is a child process on a free port with its own home, and the outcome is the one Flower reports.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.proto.federation_config_pb2 import SimulationConfig

from engines.flower_control import (
    TICK_S,
    FlowerControl,
    FlowerError,
    RunConfig,
    flower_environment,
    free_port,
    program,
    wait_until_healthy,
)
from engines.processes import ProcessTree

ASK_EVERY_S = 20.0
SOCKET_PATH = 107  # bytes in the path of a unix socket
RAY_SOCKET = len("/ray-12345678/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.12")
SHORT_FOLDERS = ("/tmp", "/var/tmp")


@dataclass(frozen=True)
class FlowerOutcome:
    """How a run ended.

    Attributes:
        status: `completed`, `failed` or `stopped`, as Flower reports it; `unknown` if Flower ended first.
        details: Flower's explanation, or what was observed.
        log: the SuperLink's log file.
    """

    status: str
    details: str
    log: Path


def run_flower(
    bundle: bytes,
    run_config: RunConfig,
    num_sites: int,
    cpus_per_site: int,
    gpus_per_site: float,
    work: Path,
    on_tick: Callable[[], None],
    settled: Callable[[], bool],
    max_seconds: float,
) -> FlowerOutcome:
    """Run an app in Flower's simulation until it ends; no process is left behind.

    Args:
        bundle: the app, see `build_bundle`.
        run_config: overrides of the app's run config, with absolute paths.
        num_sites: simulated SuperNodes.
        cpus_per_site: CPUs a site occupies while it works; as many sites as fit work in parallel.
        gpus_per_site: share of a GPU, likewise.
        work: folder for logs and Flower's home.
        on_tick: called about twice a second.
        settled: whether the app has recorded its end; Flower is then asked at once.
        max_seconds: a longer run is ended.

    Raises:
        FlowerError: Flower could not be started.
    """
    work.mkdir(parents=True, exist_ok=True)
    simulation = SimulationConfig(
        num_supernodes=num_sites, client_resources_num_cpus=cpus_per_site, client_resources_num_gpus=gpus_per_site
    )
    with ray_folder() as ray, ProcessTree() as tree:
        superlink = _SuperLink(tree, work, Path(ray))
        superlink.start(on_tick)
        with FlowerControl(superlink.address, None) as control:
            run = control.submit(bundle, run_config, simulation)
            return superlink.wait_for_end(control, run, on_tick, settled, time.monotonic() + max_seconds)


def ray_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a private temporary folder whose path is short enough for the sockets that Ray makes below it.

    Raises:
        FlowerError: there is no such place on this machine.
    """
    for base in (tempfile.gettempdir(), *SHORT_FOLDERS):
        if len(os.fsencode(base)) <= SOCKET_PATH - RAY_SOCKET:
            with contextlib.suppress(OSError):
                return tempfile.TemporaryDirectory(prefix="ray-", dir=base, ignore_cleanup_errors=True)
    raise FlowerError(
        f"Ray's sockets need a temporary folder whose path has no more than {SOCKET_PATH - RAY_SOCKET} bytes: "
        f"{tempfile.gettempdir()} is too long, and {' and '.join(SHORT_FOLDERS)} cannot be written. Set TMPDIR to a "
        "short path, or use --engine in-process."
    )


class _SuperLink:
    """One private SuperLink, for one run."""

    def __init__(self, tree: ProcessTree, work: Path, ray: Path) -> None:
        self._tree = tree
        self._log = work / "superlink.log"
        self._cwd = work / "superlink-cwd"  # without our packages: the submitted code must be what runs
        self.address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        home = work / "flwr-home"
        for folder in (home, self._cwd):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._env = flower_environment(home) | {"RAY_TMPDIR": str(ray), "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self, on_tick: Callable[[], None]) -> None:
        port = self.address.rpartition(":")[2]
        command = [program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", port]
        with self._log.open("ab") as log:
            self._process = self._tree.start(command, stdout=log, stderr=log, env=self._env, cwd=self._cwd)
        wait_until_healthy(self.address, None, self._alive, on_tick, self._log)

    def wait_for_end(
        self,
        control: FlowerControl,
        run: int,
        on_tick: Callable[[], None],
        settled: Callable[[], bool],
        deadline: float,
    ) -> FlowerOutcome:
        asked = time.monotonic()
        while True:
            on_tick()
            if not self._alive():
                return FlowerOutcome("unknown", "the SuperLink ended before the run did.", self._log)
            if time.monotonic() > deadline:
                return FlowerOutcome("unknown", "the run took longer than all its deadlines together.", self._log)
            if settled() or time.monotonic() - asked > ASK_EVERY_S:
                found = control.run(run)
                if found.finished:
                    return FlowerOutcome(found.end or "unknown", found.details, self._log)
                asked = time.monotonic()
            time.sleep(TICK_S)

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None
