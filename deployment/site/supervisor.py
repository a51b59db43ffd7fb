"""The site's long-running process: keeps a SuperNode connected, handles its tasks, restarts it when it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from client.egress import EgressGate
from client.site_config import SiteConfig
from deployment.background import ProcessRecord, exclusive
from deployment.site.site_folder import SiteFolder, audit_log, make_storage
from deployment.site.supernode_client import Runtime, UnansweredError
from deployment.site.task_runner import Runner
from deployment.site.worker_pool import Workers
from engines.processes import ProcessTree, free_port
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically, write_json
from semisam_core.plan import Plan

logger = logging.getLogger(__name__)

SUPERNODE = Path(__file__).parent / "supernode.py"
LOOPBACK = "127.0.0.1"
READY_S = 90.0
POLL_S = 0.5
LOOK_S = 2.0
STEADY_S = 300.0
LONGEST_PAUSE_S = 60.0
END_S = 10.0
# Lines of Flower in the SuperNode's log, the only sign of the state of the connection.
CONNECTED = (b"SuperNode ID:", b"Connection successful", b"Received successfully", b"Sent successfully")
DISCONNECTED = (b"Connection attempt failed", b"Failed to initialize the connection")


def only_one(folder: SiteFolder) -> contextlib.AbstractContextManager[None]:
    """Hold the folder for this process, however it ends.

    Raises:
        ConfigError: another process holds it; raised on entering.
    """
    busy = ConfigError(f"{folder.path}: this site is running already; see `semisam site status`.")
    return exclusive(folder.running / "lock", busy)


class ConnectionLog:
    """Tells from the SuperNode's log whether it is connected.

    Args:
        path: the growing log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = path.stat().st_size if path.exists() else 0
        self.connected = False

    def look(self) -> bool:
        """Read new lines and return whether the SuperNode is connected; without a log, the last known state."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read:  # it was truncated
                    self._read = 0
                file.seek(self._read)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError as error:
            logger.warning("The SuperNode's log cannot be read: %s", error)
            return self.connected
        self._read += len(whole)
        for line in whole.splitlines():
            if any(word in line for word in CONNECTED):
                self.connected = True
            elif any(word in line for word in DISCONNECTED):
                self.connected = False
        return self.connected


class Supervisor:
    """Runs a site until told to stop.

    Args:
        folder: the site's folder.
        config: its YAML.
        plan: the study plan, whose deadlines limit the time per message.
        address: the server's host:port.
    """

    def __init__(self, folder: SiteFolder, config: SiteConfig, plan: Plan, address: str) -> None:
        self._folder, self._config, self._address = folder, config, address
        self._seconds = max(plan.aggregation.join_deadline_s, plan.aggregation.round_deadline_s)
        self._log_path = folder.running / "supernode.log"
        self._starts, self._looked = 0, 0.0
        self._supernode: subprocess.Popen[bytes] | None = None
        self._log: ConnectionLog | None = None

    def run(self) -> None:
        """Work until SIGTERM, SIGHUP or Ctrl-C, then leave no process behind.

        Raises:
            ConfigError: this site is running already.
        """
        with only_one(self._folder):
            try:
                for left in self._folder.running.glob("task-*"):  # left by a supervisor that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with ProcessTree() as tree:
                    self._write_process(tree)
                    self._keep_going(tree)
            except KeyboardInterrupt:
                logger.info("Asked to stop")
            finally:
                (self._folder.running / "process.json").unlink(missing_ok=True)
                self._write_status("stopped", connected=False)

    def _keep_going(self, tree: ProcessTree) -> None:
        pause = 1.0
        with Workers(tree, self._folder.running / "worker.log") as workers:
            while True:
                began = time.monotonic()
                if not self._folder.deployment_file.is_file():
                    raise ConfigError(f"{self._folder.path}: the site's folder is gone.")
                try:
                    self._one_life(tree, workers)
                except UnansweredError as error:
                    logger.warning("%s", error)
                except Exception as error:
                    logger.error("The site's SuperNode had to be given up", exc_info=error)
                pause = 1.0 if time.monotonic() - began > STEADY_S else min(2 * pause, LONGEST_PAUSE_S)
                logger.warning("The SuperNode ended; restarting it in %g s. Its log is %s", pause, self._log_path)
                self._write_status("waiting to restart the SuperNode", connected=False)
                time.sleep(pause)

    def _one_life(self, tree: ProcessTree, workers: Workers) -> None:
        """Start a SuperNode and handle its tasks until it ends or can no longer be answered.

        Raises:
            UnansweredError: it ended, or one of its messages was lost.
        """
        secret, port = secrets.token_bytes(32), free_port()
        self._log = ConnectionLog(self._log_path)
        self._starts += 1
        self._supernode = self._start(tree, secret, port)
        runtime = Runtime(f"{LOOPBACK}:{port}", secret)
        gate = EgressGate(self._config.site, self._config.egress, audit_log(self._config).path)
        runner = Runner(
            runtime,
            self._folder.code(self._config),
            gate,
            self._folder.site_file,
            workers,
            self._folder.running,
            self._seconds,
            self._config.egress.maximum_update_mb * 1e6,
            self._tick,
        )
        try:
            self._wait_until_ready(port)
            while True:
                self._tick()
                runner.work()
                time.sleep(POLL_S)
        finally:
            runtime.close()
            _end(self._supernode)

    def _start(self, tree: ProcessTree, secret: bytes, port: int) -> subprocess.Popen[bytes]:
        secret_file = self._folder.running / "secret"
        write_atomically(secret_file, secret, 0o600)
        command = [sys.executable, "-I", str(SUPERNODE), str(os.getpid()), "--superlink", self._address]
        command += ["--root-certificates", str(self._folder.ca_file)]
        command += ["--auth-supernode-private-key", str(self._folder.private_key)]
        command += ["--isolation", "process", "--host", LOOPBACK, "--port", str(port)]
        command += ["--superexec-auth-secret-file", str(secret_file)]
        with self._log_path.open("ab") as log:
            return tree.start(command, log, log, env=_environment(self._folder), cwd=self._folder.running)

    def _wait_until_ready(self, port: int) -> None:
        deadline = time.monotonic() + READY_S
        assert self._supernode is not None
        while time.monotonic() < deadline:
            self._tick()
            if serves(self._supernode.pid, port):
                (self._folder.running / "secret").unlink(missing_ok=True)  # the SuperNode has read it
                return
            time.sleep(POLL_S)
        raise UnansweredError(f"the SuperNode was not ready within {READY_S:g} s")

    def _tick(self) -> None:
        """Record the state of the SuperNode.

        Raises:
            UnansweredError: it has ended.
        """
        assert self._supernode is not None
        if self._supernode.poll() is not None:
            raise UnansweredError("the SuperNode has ended")
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            assert self._log is not None
            self._write_status("running", self._log.look())

    def _write_process(self, tree: ProcessTree) -> None:
        ProcessRecord.of(os.getpid(), tree.mark).write(self._folder.running / "process.json")

    def _write_status(self, state: str, connected: bool) -> None:
        content = {"state": state, "connected": connected, "supernode_starts": self._starts, "time": time.time()}
        try:
            write_json(self._folder.running / "status.json", content)
        except OSError as error:
            logger.warning("The status could not be written: %s", error.strerror)


def _environment(folder: SiteFolder) -> dict[str, str]:
    local = ",".join(filter(None, (os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), LOOPBACK)))
    return dict(os.environ) | {
        "FLWR_HOME": str(folder.running / "flwr-home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": local,
        "no_proxy": local,
    }


def work_here(folder: SiteFolder) -> None:
    """Run as the site's supervisor until told to stop; logs go to standard error.

    Raises:
        ConfigError: the site is running already, or one of its files is wrong.
    """
    config, plan, address = folder.config(), folder.plan(), folder.deployment().address
    os.environ.update(_environment(folder))  # this process must reach its own machine without a proxy too
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    make_storage(config)
    Supervisor(folder, config, plan, address).run()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_S)


def serves(pid: int, port: int) -> bool:
    """Return whether this very process listens on a port, since another user's might have taken it first."""
    with contextlib.suppress(psutil.Error):
        listening = psutil.Process(pid).net_connections("tcp")
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in listening)
    return False
