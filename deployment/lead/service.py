"""The SuperLink as a service: start it in the background or foreground, find it again, stop it and its children."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from deployment.background import ProcessRecord, exclusive
from deployment.lead.registration import sync_registrations
from deployment.lead.study_folder import LeadError, StudyFolder
from engines.flower_control import FlowerControl, flower_environment, wait_until_healthy
from engines.processes import ProcessTree
from server.superlink_watch import SUPERLINK

PROGRAM = Path(__file__).with_name("superlink.py")
LOG_BYTES = 20 * 2**20
FOREGROUND_TICK_S = 0.5


def find(study: StudyFolder) -> ProcessRecord | None:
    """Return the study's SuperLink if it runs."""
    service = _recorded(study)
    return service if service is not None and service.alive else None


def control_of(study: StudyFolder) -> FlowerControl:
    """Return a connection to the running SuperLink's control API.

    Raises:
        LeadError: it does not run.
    """
    if find(study) is None:
        raise LeadError(f"the SuperLink of {study.settings.name} is not running; `semisam lead start` starts it.")
    return FlowerControl(study.settings.control_address, study.ca)


def start(study: StudyFolder) -> ProcessRecord:
    """Start the SuperLink in the background; return once it serves.

    Raises:
        LeadError: it is already running.
        FlowerError: it did not come up; the log says why.
    """
    with alone(study), log_file(study).open("ab") as log:
        _prepare(study)
        tree = ProcessTree()
        try:
            return _begin(study, tree, log)
        except BaseException:
            tree.end()
            _record(study).unlink(missing_ok=True)
            raise


def serve(study: StudyFolder, ready: contextlib.AbstractContextManager[None]) -> None:
    """Run the SuperLink until it ends or this process is asked to end; no process is left behind.

    Args:
        study: the study.
        ready: entered once the SuperLink serves.

    Raises:
        LeadError: it is already running, or it ended unasked.
        FlowerError: it did not come up.
    """
    with ProcessTree() as tree, os.fdopen(os.dup(1), "wb") as out:
        try:
            with alone(study):
                _prepare(study)
                service = _begin(study, tree, out)
            with ready:
                while service.alive:
                    time.sleep(FOREGROUND_TICK_S)
        finally:
            _record(study).unlink(missing_ok=True)
    raise LeadError("the SuperLink ended; its output is above.")


def stop(study: StudyFolder) -> bool:
    """Stop the SuperLink and all its descendants; return whether any was running.

    Raises:
        LeadError: a process could not be stopped.
    """
    with alone(study):
        service = _recorded(study)
        if service is None:
            return False
        tree = ProcessTree(service.mark)
        found = bool(tree.alive())
        tree.end()
        if left := tree.alive():
            raise LeadError(f"these processes could not be stopped: {', '.join(str(process.pid) for process in left)}.")
        _record(study).unlink(missing_ok=True)
        return found


def alone(
    study: StudyFolder, lock: str = "lock", doing: str = "starting or stopping the SuperLink"
) -> contextlib.AbstractContextManager[None]:
    """Let one command at a time do something with a study.

    Raises:
        LeadError: another command is doing it; raised on entering.
    """
    return exclusive(study.server / lock, LeadError(f"another `semisam lead` command is {doing}."))


def log_file(study: StudyFolder) -> Path:
    """Return the log file of a SuperLink in the background."""
    return study.server / "superlink.log"


def _prepare(study: StudyFolder) -> None:
    if (service := _recorded(study)) is not None:
        if service.alive:
            raise LeadError(f"the SuperLink of {study.settings.name} is already running (process {service.pid}).")
        ProcessTree(service.mark).end()  # it was killed; its children must not meet the next one
    log = log_file(study)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    for folder in (study.server / "flwr-home", study.server / "cwd"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _begin(study: StudyFolder, tree: ProcessTree, out: IO[bytes]) -> ProcessRecord:
    settings = study.settings
    command = [sys.executable, "-P", str(PROGRAM), "--host", settings.bind, "--port", str(settings.port)]
    command += ["--control-port", str(settings.control_port), "--tls", str(study.tls)]
    command += ["--database", str(study.server / "superlink.db"), "--update-size", str(study.update_size)]
    command += ["--free-disk-mb", str(settings.uploads.free_disk_mb)]
    command += [word for key, value in settings.connections for word in (f"--{key.replace('_', '-')}", str(value))]
    environment = flower_environment(study.server / "flwr-home") | {SUPERLINK: settings.control_address}
    process = tree.start(command, stdout=out, stderr=out, env=environment, cwd=study.server / "cwd")
    service = ProcessRecord.of(process.pid, tree.mark)
    service.write(_record(study))
    _wait(study, process)
    with FlowerControl(settings.control_address, study.ca) as control:
        for run in control.unfinished_runs():
            control.stop(run.run_id)  # left by an earlier SuperLink: no process works on it any more
        sync_registrations(study, control)
    return service


def _wait(study: StudyFolder, process: subprocess.Popen[bytes]) -> None:
    def alive() -> bool:
        return process.poll() is None

    wait_until_healthy(study.settings.control_address, study.ca, alive, lambda: None, log_file(study))
    if not alive():
        raise LeadError(f"another program answers on {study.settings.control_address}; see {log_file(study)}.")


def _record(study: StudyFolder) -> Path:
    return study.server / "superlink.json"


def _recorded(study: StudyFolder) -> ProcessRecord | None:
    return ProcessRecord.read(_record(study))
