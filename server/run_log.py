"""Run loggers: what else keeps a run's scalars, beside its own metrics. None of them can stop a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from server.metrics_log import RESUMED
from server.run_folder import RecordNotKeptError, RunFolder
from server.scalars import RoundScalars, ScalarReader, history

logger = logging.getLogger(__name__)
NOT_LOGGED = "not-logged"


class RunLogger(Protocol):
    """Keeps scalars by round, in a format that another program shows."""

    @property
    def name(self) -> str:
        """What people know it as."""

    def begin(self) -> None:
        """Begin with an empty log: whatever it kept of this run before does not count any more."""

    def log(self, steps: Iterable[RoundScalars]) -> None:
        """Keep scalars, on disk when this returns."""

    def end(self, state: str) -> None:
        """End the log with the run's state: completed or failed."""


class RunLog:
    """Feeds the lines of a run's metrics to its loggers.

    A logger that is new, has failed, or whose run was resumed begins again and is given all scalars so far, so it has
    each scalar of each round once, whatever happened in between.

    What cannot be written is recorded as `not-logged`, with the reason.

    Args:
        folder: the run folder, whose lines are listened to from now on.
        plan: the study plan.
        loggers: the loggers.
    """

    def __init__(self, folder: RunFolder, plan: Plan, loggers: Sequence[RunLogger]) -> None:
        self._folder, self._plan, self._loggers = folder, plan, loggers
        self._reader = ScalarReader(plan)
        self._behind = {each.name for each in loggers}
        self._told: set[tuple[str, str]] = set()
        folder.listeners.append(self._feed)

    def _feed(self, line: Mapping[str, Any]) -> None:
        if line.get("event") == RESUMED:
            self._behind = {each.name for each in self._loggers}
        if (step := self._reader.read(line)) is not None:
            for each in self._loggers:
                self._guard(each, [step])

    def end(self, state: str) -> None:
        """End all logs with the run's state, completed or failed; one that lacks scalars is given them first."""
        for each in self._loggers:
            self._guard(each, [], state)

    def _guard(self, each: RunLogger, steps: Sequence[RoundScalars], state: str = "") -> None:
        try:
            self._log(each, steps)
            if state:
                each.end(state)
        except Exception as error:  # noqa: BLE001 (whatever another program's library raises)
            self._behind.add(each.name)
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s could not be written: %s", each.name, reason)
            if (each.name, reason) not in self._told:
                self._told.add((each.name, reason))
                with contextlib.suppress(RecordNotKeptError):
                    self._folder.record(NOT_LOGGED, logger=each.name, reason=reason)

    def _log(self, each: RunLogger, steps: Sequence[RoundScalars]) -> None:
        if each.name in self._behind:
            each.begin()
            steps = history(self._plan, read_json_lines(self._folder.metrics_path))
        each.log(steps)
        self._behind.discard(each.name)
