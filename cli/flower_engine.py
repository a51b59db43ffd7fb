"""`flwr run` in Flower's simulation, with a private SuperLink that ends with the run and an answer one can trust.

Flower's own command starts a detached SuperLink, returns 0 whatever happened and leaves processes behind; here the
SuperLink is a child on a free port with its own home, and the run's end is asked of Flower, not assumed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import client
import semisam_core
import server
from cli.processes import ProcessTree
from semisam_core.errors import SemiSAMError

RunConfig = Mapping[str, str | int]

TICK_S = 0.4
ASK_EVERY_S = 20.0
START_DEADLINE_S = 120.0
CONNECTION = "private"
APP_SETTINGS = """\
[tool.flwr.app]
publisher = "fedsemisam"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
plan = ""
sites = ""
num-sites = 0
run-folder = ""
"""


class FlowerError(SemiSAMError):
    """Flower could not be started or asked; the message says where its log is."""


@dataclass(frozen=True)
class FlowerOutcome:
    """How a run ended, by Flower's own account.

    Attributes:
        status: `completed`, `failed`, `stopped`, or `unknown` where Flower was gone before it could be asked.
        details: what Flower adds, or what was seen.
        log: the SuperLink's log file.
    """

    status: str
    details: str
    log: Path


def stage_app(work: Path) -> Path:
    """Copy the apps and the core, nothing else, into a folder that `flwr run` can bundle; return it."""
    app = work / "app"
    shutil.rmtree(app, ignore_errors=True)
    for package in (client, server, semisam_core):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, app / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    version = importlib.metadata.version("fedsemisam")
    project = f'[project]\nname = "fedsemisam"\nversion = "{version}"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
    (app / "pyproject.toml").write_text(project + APP_SETTINGS, encoding="utf-8")
    return app


def run_flower(
    app: Path,
    run_config: RunConfig,
    num_sites: int,
    cpus_per_site: float,
    gpus_per_site: float,
    work: Path,
    on_tick: Callable[[], None],
    settled: Callable[[], bool],
    max_seconds: float,
) -> FlowerOutcome:
    """Run an app in Flower's simulation and wait for its end; nothing stays running afterwards.

    Args:
        app: folder with a pyproject.toml, see `stage_app`.
        run_config: overrides of the app's run config; paths absolute.
        num_sites: simulated SuperNodes.
        cpus_per_site: CPUs that one site takes while it works; sites work side by side as far as CPUs reach.
        gpus_per_site: share of a GPU, likewise.
        work: folder for logs and Flower's own home.
        on_tick: called about twice a second.
        settled: whether the app has written its end; Flower is then asked at once.
        max_seconds: longer runs are ended.

    Raises:
        FlowerError: Flower could not be started.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="semisam-", ignore_cleanup_errors=True) as ray, ProcessTree() as tree:
        session = _Session(tree, work, Path(ray))
        session.start_superlink()
        session.wait_until_healthy(on_tick)
        run = session.submit(app, run_config, num_sites, cpus_per_site, gpus_per_site)
        return session.wait_for_end(run, on_tick, settled, time.monotonic() + max_seconds)


class _Session:
    """One private SuperLink and the runs submitted to it."""

    def __init__(self, tree: ProcessTree, work: Path, ray: Path) -> None:
        self._tree = tree
        self._log = work / "superlink.log"
        self._home = work / "flwr-home"
        self._cwd = work / "superlink-cwd"  # without packages of ours: what was submitted must be what runs
        self._address = f"127.0.0.1:{_free_port()}"
        self._superlink: subprocess.Popen[bytes] | None = None
        for folder in (self._home, self._cwd):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        connection = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        connection += f'address = "{self._address}"\ninsecure = true\n'
        (self._home / "config.toml").write_text(connection, encoding="utf-8")
        self._env = dict(os.environ) | {
            "FLWR_HOME": str(self._home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_TMPDIR": str(ray),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def start_superlink(self) -> None:
        port = self._address.rpartition(":")[2]
        command = [_program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", port]
        with self._log.open("ab") as log:
            self._superlink = self._tree.start(command, stdout=log, stderr=log, env=self._env, cwd=self._cwd)

    def wait_until_healthy(self, on_tick: Callable[[], None]) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._superlink is None or self._superlink.poll() is not None:
                raise FlowerError(f"flower-superlink ended before it was ready; its log is {self._log}.")
            try:
                with urlopen(f"http://{self._address}/health", timeout=2):
                    return
            except (URLError, OSError):
                on_tick()
                time.sleep(TICK_S)
        raise FlowerError(f"flower-superlink was not ready within {START_DEADLINE_S:g} s; its log is {self._log}.")

    def submit(self, app: Path, run_config: RunConfig, sites: int, cpus: float, gpus: float) -> str:
        overrides = self._home / "run-config.toml"
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in run_config.items()]
        overrides.write_text("\n".join(lines) + "\n", encoding="utf-8")
        federation = f"num-supernodes={sites} client-resources-num-cpus={cpus:g} client-resources-num-gpus={gpus:g}"
        command = ["run", str(app), CONNECTION, "--format", "json", "-c", str(overrides)]
        answer = self._ask([*command, "--federation-config", federation])
        if not answer.get("success"):
            raise FlowerError(f"flwr run: {answer.get('error-message', answer)}. The log is {self._log}.")
        return str(answer["run-id"])

    def wait_for_end(
        self, run: str, on_tick: Callable[[], None], settled: Callable[[], bool], deadline: float
    ) -> FlowerOutcome:
        asked = time.monotonic()
        while True:
            on_tick()
            if self._superlink is None or self._superlink.poll() is not None:
                return FlowerOutcome("unknown", "the SuperLink ended before the run did.", self._log)
            if time.monotonic() > deadline:
                return FlowerOutcome("unknown", "the run took longer than all its deadlines together.", self._log)
            if settled() or time.monotonic() - asked > ASK_EVERY_S:
                status, details = self._status(run)
                if status is not None:
                    return FlowerOutcome(status, details, self._log)
                asked = time.monotonic()
            time.sleep(TICK_S)

    def _status(self, run: str) -> tuple[str | None, str]:
        answer = self._ask(["list", CONNECTION, "--run-id", run, "--format", "json"])
        try:
            listed = answer["runs"][0]
            state, _, end = str(listed["status"]).partition(":")
        except (KeyError, IndexError, TypeError):
            raise FlowerError(f"flwr list gave no status: {answer}. The log is {self._log}.") from None
        return (end or "unknown", str(listed.get("status-details", ""))) if state == "finished" else (None, "")

    def _ask(self, arguments: list[str]) -> dict[str, Any]:
        command = [_program("flwr"), *arguments]
        try:
            done = subprocess.run(
                command,
                env=self._tree.environment(self._env),
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=START_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FlowerError(f"`flwr {arguments[0]}` gave no answer within {START_DEADLINE_S:g} s.") from None
        start, end = done.stdout.find("{"), done.stdout.rfind("}")
        try:
            answer: dict[str, Any] = json.loads(done.stdout[start : end + 1])
        except json.JSONDecodeError:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise FlowerError(f"`flwr {arguments[0]}` failed ({done.returncode}): {said}") from None
        return answer


def _program(name: str) -> str:
    """Return the program beside this Python, so that another environment's Flower is never taken."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FlowerError(f"the program {name} is not installed beside {sys.executable}; install flwr[simulation].")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
