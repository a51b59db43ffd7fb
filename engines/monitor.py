"""Show a run while it goes on: a live view on a terminal; elsewhere, one line per event."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from engines.following import RunFollower
from engines.run_view import Snapshot, snapshot, view
from server.events import Narrator


class RunMonitor:
    """Shows a run from its files. On a terminal, lines of events scroll by above the view.

    Args:
        title: name of the run.
        run_folder: the server's record.
        storages: site name -> its storage folder, of sites on this machine.
        console: where to print.
        below: shown below the view, on a terminal.
    """

    def __init__(
        self,
        title: str,
        run_folder: Path,
        storages: Mapping[str, Path],
        console: Console,
        below: RenderableType = "",
    ) -> None:
        self.below = below
        self._title, self._console = title, console
        self._follower = RunFollower(run_folder, storages)
        self._said: set[tuple[str, int, str]] = set()
        self._seen: tuple[Any, ...] = ()
        self._snapshot: Snapshot | None = None
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._narrator = Narrator(self._follower.news())  # what is known when the following begins is not said again

    def __enter__(self) -> RunMonitor:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.tick()
        finally:
            if self._live is not None:
                self._live.stop()

    def tick(self) -> None:
        """Show what is new."""
        for event in self._follower.news():
            if (text := self._narrator.describe(event)) is not None:
                self.say(text)
        work = self._follower.work()
        if self._live is None:
            self._say_work(work)
            return
        seen = (len(self._follower.lines), self._follower.status(), work)
        if self._snapshot is None or seen != self._seen:
            self._seen = seen
            self._snapshot = snapshot(self._title, self._follower.lines, seen[1], work)
        shown = view(self._snapshot, time.time())
        self._live.update(Group(shown, self.below) if self.below else shown, refresh=True)

    def say(self, text: str) -> None:
        """Print a line, above the view if there is one."""
        self._console.print(f"  {text}", highlight=False, markup=False)

    def _say_work(self, work: Mapping[str, Mapping[str, Any]]) -> None:
        for site, line in work.items():
            said = (site, line["round"], line["phase"])
            if said not in self._said:
                self._said.add(said)
                self.say(f"{site}: round {line['round']}, {line['phase']}, {line['total']} {line['unit']}")
