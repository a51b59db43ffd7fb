"""`semisam lead status --watch`: show the study and its run until the run ends. Only reads, so it disturbs no run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from deployment.lead.status import status_of, status_view
from deployment.lead.study_folder import StudyFolder
from engines.monitor import RunMonitor
from engines.run_state import settled
from semisam_core.errors import ConfigError
from semisam_core.text import printable

TICK_S = 0.5
ASK_EVERY_S = 10.0
UNREACHABLE_S = 180.0
GOES_ON = ("starting", "running")
UNKNOWN = "unknown"

Status = dict[str, Any]


def watch(
    study: StudyFolder,
    console: Console,
    as_json: bool = False,
    status: Callable[[StudyFolder], Status] = status_of,
    unreachable_s: float = UNREACHABLE_S,
    ask_every_s: float = ASK_EVERY_S,
) -> None:
    """Show the study and its last run until that run has ended, then say how.

    On a terminal there is one view that is kept up to date; elsewhere the status now, then one line per change.

    Args:
        study: the study.
        console: where to print.
        as_json: whether JSON was asked for, which cannot be watched.
        status: asks for the study's status.
        unreachable_s: after how many seconds without an answer from the SuperLink watching ends.
        ask_every_s: how often to ask the SuperLink; the run's own files are read all the time.

    Raises:
        ConfigError: `as_json`, or the study cannot be read.
        FlowerError, OSError: the study cannot be read.
    """
    if as_json:
        raise ConfigError("--watch is for people; for scripts use --json alone, as often as needed.")
    found = status(study)
    if found["run"] is None:
        console.print(status_view(found))
        console.print("No run has been started.")
        return
    folder = Path(found["run"]["folder"])
    with RunMonitor(study.settings.name, folder, {}, console, status_view(found, with_run=False)) as monitor:
        if not console.is_terminal:
            console.print(status_view(found))
        asked = answered = time.monotonic()
        while found["run"]["state"] in (*GOES_ON, UNKNOWN) and time.monotonic() - answered < unreachable_s:
            time.sleep(TICK_S)
            monitor.tick()
            if settled(folder) or time.monotonic() - asked > ask_every_s:
                before, found = found, _of_run(status(study), folder)
                asked = time.monotonic()
                answered = answered if found["run"]["state"] == UNKNOWN else asked
                monitor.below = status_view(found, with_run=False)
                for change in changes(before, found):
                    monitor.say(change)
    console.print(_end(found["run"]), highlight=False, markup=False, soft_wrap=True)


def changes(before: Status, now: Status) -> Iterator[str]:
    """Yield what differs between two statuses, besides the run itself: a sentence each."""
    if before["superlink"]["running"] != now["superlink"]["running"]:
        yield "the SuperLink is running" if now["superlink"]["running"] else "the SuperLink has ended"
    known = {each["site"]: each["connection"] for each in before["sites"]}
    for each in now["sites"]:
        if (was := known.get(each["site"], "not registered")) != each["connection"]:
            yield f"{each['site']} is {each['connection']}, was {was}"


def _of_run(found: Status, folder: Path) -> Status:
    """Return a status whose run is the one that is watched: another one may have been started since."""
    if found["run"] is not None and Path(found["run"]["folder"]) == folder:
        return found
    return found | {"run": {"folder": str(folder), "state": "over", "reason": "Another run has been started."}}


def _end(run: Status) -> str:
    if run["state"] in (*GOES_ON, UNKNOWN):
        return f"No longer watching {run['folder']}: the SuperLink does not answer. The run may go on."
    return printable(f"Run {run['folder']}: {run['state']}. {run['reason']}".rstrip())
