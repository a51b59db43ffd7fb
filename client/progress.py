"""The site's progress as JSON lines in its own storage folder. Never sent."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from semisam_core.files import append_json_line

INTERVAL_S = 0.5


class ProgressLog:
    """Appends (phase, done, total) lines: the first and last of every phase, and at most two a second in between.

    Args:
        path: the file. A failed write is only logged: progress must never stop the work.
        round_number: the round in progress.
    """

    def __init__(self, path: Path, round_number: int) -> None:
        self._path, self._round = path, round_number
        self._last = 0.0

    def __call__(self, phase: str, done: int, total: int, unit: str = "") -> None:
        """Report that `done` of `total` units of a phase are finished. An empty phase (total 0) is not reported."""
        if total == 0:
            return
        now = time.monotonic()
        if 0 < done < total and now - self._last < INTERVAL_S:
            return
        self._last = now
        line = {
            "time": time.time(),
            "round": self._round,
            "phase": phase,
            "done": done,
            "total": total,
            "unit": unit,
        }
        try:
            append_json_line(self._path, line)
        except OSError as error:
            logging.getLogger(__name__).debug("progress could not be written: %s", error)
