"""Show a run's progress: rounds from the run folder, each site's work from its storage. Only reads files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from engines.results import count_words
from server.metrics_log import bucketed, gradient_shares

TAIL_BYTES = 4096


def describe(event: Mapping[str, Any], in_buckets: bool = False) -> str | None:
    """Return an event in words, or None for one that people need not see.

    Args:
        event: a line of the metrics.
        in_buckets: whether the site's counts are the lowest of a bucket.
    """
    kind = event.get("event")

    def count(name: str) -> str:
        return count_words(event.get(name, 0), in_buckets)

    if kind == "aggregated":
        left = event["rounds"] - event["round"]
        return (
            f"round {event['round']}/{event['rounds']} aggregated after {event['seconds']:.0f} s; "
            f"{left} left, about {left * event['seconds'] / 60:.1f} min"
        )
    if kind in ("joined", "rejoined"):
        return (
            f"{event['site']} {kind}: {count('labeled')} labeled, {count('unlabeled')} unlabeled, "
            f"{count('validation')} validation, {count('quarantined')} quarantined"
        )
    if kind == "trained":
        told = "accepted" in event  # a private round does not say
        pseudo_labels = f", pseudo-labels {count('accepted')} accepted, {count('gated')} gated" if told else ""
        return (
            f"round {event['round']}: {event['site']} trained {event['steps']:.0f} steps"
            f"{pseudo_labels}{_gradients(event, in_buckets)}{_epsilon(event)}"
        )
    if kind == "evaluated":
        scores = [f"{key[5:]} {value:.3f}" for key, value in event.items() if key.startswith("dice.")]
        withheld = "withheld" if in_buckets and event["validation"] else "not sent"
        return f"round {event['round']}: {event['site']} Dice {', '.join(scores) or withheld}"
    if kind == "refused":
        return f"round {event['round']}: {event['site']} is left out: {event['reason']}"
    if kind == "sum-given-up":
        return f"round {event['round']}: the secure sum was given up at attempt {event['attempt']}: {event['reason']}"
    if kind == "silent":
        return f"round {event['round']}: {', '.join(event['names'])} did not answer within {event['seconds']:g} s"
    return _fault(event)


def _epsilon(event: Mapping[str, Any]) -> str:
    """Return what a private round cost, if the site says so."""
    if "epsilon.round" not in event:
        return ""
    return (
        f"; privacy: epsilon {event['epsilon.round']:.2f}, in total {event['epsilon.total']:.2f} "
        f"at delta {event['epsilon.delta']:g}"
    )


def _gradients(event: Mapping[str, Any], in_buckets: bool) -> str:
    """Return each loss term's share of the gradients, so that a term that teaches nothing is seen at once."""
    shares = gradient_shares(event, in_buckets)
    return "; gradient " + ", ".join(f"{term} {share:.0%}" for term, share in shares.items()) if len(shares) > 1 else ""


class RunMonitor:
    """A live display on a terminal; elsewhere, one line per event.

    Args:
        title: name of the run.
        run_folder: the server's record.
        storages: site name -> its storage folder.
        console: where to print.
    """

    def __init__(self, title: str, run_folder: Path, storages: Mapping[str, Path], console: Console) -> None:
        self._title, self._folder, self._storages, self._console = title, run_folder, storages, console
        self._offset = self._start_of_news()
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._rounds = self._progress.add_task(f"{title}: rounds", total=None, note="starting")
        self._sites: dict[str, TaskID] = {}
        self._phases: dict[str, str] = {}
        self._said: set[tuple[str, int, str]] = set()
        self._in_buckets: set[str] = set()

    def __enter__(self) -> RunMonitor:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tick()
        self._progress.stop()

    def tick(self) -> None:
        """Show what is new."""
        for event in self._news():
            self._show(event)
        for site, storage in self._storages.items():
            self._show_site(site, storage)

    def _show(self, event: Mapping[str, Any]) -> None:
        if bucketed(event):
            self._in_buckets.add(str(event["site"]))
        if event.get("event") == "aggregated":
            self._progress.update(self._rounds, completed=event["round"], total=event["rounds"], note="")
        if (text := describe(event, str(event.get("site")) in self._in_buckets)) is not None:
            self._say(text)

    def _say(self, text: str) -> None:
        self._progress.console.print(f"  {text}", highlight=False, markup=False)

    def _show_site(self, site: str, storage: Path) -> None:
        line = self._last_line(storage)
        if line is None:
            return
        if site not in self._sites:
            self._sites[site] = self._progress.add_task(f"  {site}", total=None, note="")
        note = f"round {line['round']} {line['phase']} ({line['unit']})"
        task = self._sites[site]
        if self._phases.get(site) != note:
            self._phases[site] = note
            self._progress.reset(task, total=line["total"] or None, note=note)
            said = (site, line["round"], line["phase"])
            if not self._live and said not in self._said:
                self._said.add(said)
                self._say(f"{site}: round {line['round']}, {line['phase']}, {line['total']} {line['unit']}")
        self._progress.update(task, completed=line["done"], total=line["total"] or None, note=note)

    def _last_line(self, storage: Path) -> dict[str, Any] | None:
        try:
            run = json.loads((self._folder / "run.json").read_text())["run"]
            with (storage / "runs" / run / "progress.jsonl").open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - TAIL_BYTES))
                lines = file.read().splitlines()
        except (OSError, ValueError, KeyError):
            return None
        for text in reversed(lines):
            try:
                line: dict[str, Any] = json.loads(text)
            except ValueError:
                continue
            return line
        return None

    def _start_of_news(self) -> int:
        path = self._folder / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def _news(self) -> list[dict[str, Any]]:
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = []
        for text in whole.splitlines():
            try:
                events.append(json.loads(text))
            except ValueError:
                continue
        return events


def _fault(event: Mapping[str, Any]) -> str | None:
    """Return a sentence about a fault that the run handles, or None for other events."""
    kind, at = event.get("event"), f"round {event.get('round')}:"
    if kind == "late":
        return f"{at} the reply of {event['site']} came {event['seconds']:.0f} s late and is not used"
    if kind == "left":
        return f"{at} {event['site']} left: {event['reason']}"
    if kind == "waiting":
        return f"{at} too few sites; waiting up to {event['seconds']:g} s for {', '.join(event['sites']) or 'others'}"
    if kind == "excluded":
        return f"{at} {event['site']} is left out until round {event['until']}: {event['reason']}"
    if kind == "set-aside":
        return f"a checkpoint was set aside: {event['reason']}"
    if kind == "not-logged":
        return f"{event['logger']} could not be written, the run goes on: {event['reason']}"
    if kind == "resumed":
        return f"resumed from round {event['round']}"
    return None
