"""Follow a run by its files, from any process. Files that are missing or being written are looked at again later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.run_state import run_name, run_status

TAIL_BYTES = 4096


class RunFollower:
    """Reads a run's events, its status and its sites' progress as they are written.

    Args:
        run_folder: the server's record.
        storages: site name -> its storage folder, of sites on this machine.
    """

    def __init__(self, run_folder: Path, storages: Mapping[str, Path]) -> None:
        self._folder, self._storages = run_folder, storages
        self._offset = 0
        self.lines: list[dict[str, Any]] = []

    def news(self) -> list[dict[str, Any]]:
        """Return the events since the last call; `lines` has them all."""
        try:
            with (self._folder / "metrics.jsonl").open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = [line for text in whole.splitlines() if "event" in (line := _mapping(text) or {})]
        self.lines += found
        return found

    def status(self) -> dict[str, Any]:
        """Return what status.json says; empty while there is none."""
        return run_status(self._folder)

    def work(self) -> dict[str, dict[str, Any]]:
        """Return the last line of progress of each site that has any."""
        run = run_name(self._folder)
        found = {site: _last_line(path / "runs" / run / "progress.jsonl") for site, path in self._storages.items()}
        return {site: line for site, line in found.items() if line is not None}


def _last_line(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    return next((line for text in reversed(lines) if (line := _mapping(text)) is not None), None)


def _mapping(text: bytes) -> dict[str, Any] | None:
    """Return a line's mapping, or None for a line that was torn by a kill."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line else None
