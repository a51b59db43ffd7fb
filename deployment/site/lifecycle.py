"""Start a site in the background, find it and stop it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from deployment.background import ProcessRecord
from deployment.site.site_folder import SiteFolder
from engines.processes import ProcessTree
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import utc_stamp, write_json

START_S = 120.0
STOP_S = 40.0
KILL_S = 5.0
TICK_S = 0.2


class StartError(SemiSAMError):
    """The site did not start; the message says where its log is."""


@dataclass(frozen=True)
class Running:
    """A site's running supervisor.

    Attributes:
        process: the supervisor.
        mark: carried by its children in their environment.
        status: the last status it wrote.
    """

    process: psutil.Process
    mark: str
    status: dict[str, Any]

    @property
    def connected(self) -> bool:
        """Whether the SuperNode is connected to the server."""
        return self.status.get("connected") is True


def running(folder: SiteFolder) -> Running | None:
    """Return the site's supervisor, or None. Another process that got the same number does not count."""
    noted = ProcessRecord.read(folder.running / "process.json")
    process = None if noted is None else noted.process
    return None if noted is None or process is None else Running(process, noted.mark, _read(folder, "status.json"))


def check_startable(folder: SiteFolder) -> None:
    """Check what must hold before a site may start.

    Raises:
        ConfigError: it has withdrawn, is running already, or has approved no code.
    """
    if folder.withdrawn_file.exists():
        raise ConfigError(
            f"{folder.path}: this site has withdrawn from the study; `semisam site withdraw --undo` reverses that."
        )
    if running(folder) is not None:
        raise ConfigError(f"{folder.path}: this site is running already; see `semisam site status`.")
    if not folder.code(folder.config()).approved():
        raise ConfigError(
            "no code is approved here, so nothing could run; approve it with `semisam site approve invitation.zip`."
        )


def start(folder: SiteFolder) -> Running:
    """Start the site in the background and return once it runs, connected or not.

    Raises:
        ConfigError: it may not start, see `check_startable`.
        StartError: it exited at once, or did not come up in time.
    """
    check_startable(folder)
    folder.running.mkdir(mode=0o700, exist_ok=True)
    (folder.running / "status.json").unlink(missing_ok=True)
    log = folder.running / "supervisor.log"
    command = [sys.executable, "-P", "-m", "cli.main", "site", "start", "--folder", str(folder.path), "--foreground"]
    with log.open("ab") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = running(folder)
        if found is not None and (found.connected or time.monotonic() > deadline - START_S * 2 / 3):
            return found
        if child.poll() is not None:
            raise StartError(f"the site did not start; its log is {log}.")
        time.sleep(TICK_S)
    child.terminate()
    raise StartError(f"the site did not come up within {START_S:g} s; its log is {log}.")


def stop(folder: SiteFolder) -> bool:
    """Stop the site and all its processes; return whether it was running.

    Raises:
        StartError: one of its processes cannot be stopped.
    """
    found = running(folder)
    if found is None:
        return False
    with contextlib.suppress(psutil.Error):
        found.process.terminate()
    psutil.wait_procs([found.process], timeout=STOP_S)
    left = [found.process] if found.process.is_running() else []
    left += ProcessTree(found.mark).alive()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, alive = psutil.wait_procs(left, timeout=KILL_S)
    if alive:
        raise StartError(f"these processes cannot be stopped: {', '.join(str(process.pid) for process in alive)}.")
    (folder.running / "process.json").unlink(missing_ok=True)
    return True


def withdraw(folder: SiteFolder) -> bool:
    """Mark the site as withdrawn and stop it, even if it cannot be marked; return whether it was running.

    Raises:
        StartError: it cannot be stopped.
        OSError: it was stopped but could not be marked.
    """
    try:
        write_json(folder.withdrawn_file, {"time": utc_stamp()})
    finally:
        stopped = stop(folder)
    return stopped


def _read(folder: SiteFolder, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder.running / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
