"""How a run is shown on a terminal: a snapshot of its files, and its picture. Both are pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from engines.tables import FittingTable
from semisam_core.text import printable
from server.events import FAULTS, count_words, describe
from server.metrics_log import TERMS, bucketed, counted, gradient_shares, mean_over_classes

Line = Mapping[str, Any]
WARNINGS = FAULTS - {"rejoined", "resumed"}
JOINED = ("joined", "rejoined")
RECENT_ROUNDS = 5
LAST_WARNINGS = 3
NONE, WITHHELD = "-", "withheld"
_DONE = {
    "joined": "joined",
    "rejoined": "joined",
    "trained": "trained",
    "evaluated": "scored",
    "refused": "left out",
    "late": "late",
    "left": "left",
}


@dataclass(frozen=True)
class SiteView:
    """One site, in words.

    Attributes:
        name: the site.
        phase: what it does, or did last.
        round: the last round whose update it sent.
        dice: its last score, the mean over structures.
        pseudo_labels: accepted/gated, in that round.
        shares: percent of the gradients of each of `TERMS`, in that round.
        faults: how many of what went wrong name it.
    """

    name: str
    phase: str
    round: str
    dice: str
    pseudo_labels: str
    shares: str
    faults: int


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        title: the run's name for people.
        state: not started, running, completed or failed.
        phase: what the run waits for: joining, training and so on.
        reason: why it takes longer than usual, or why it failed.
        done: rounds that have finished.
        rounds: of how many; None until one has finished.
        round_s: seconds a round takes, with its scores; None until one has finished.
        since: when the last round finished, in seconds since 1970; None likewise.
        sites: by name.
        warnings: the last ones, in sentences.
    """

    title: str
    state: str
    phase: str
    reason: str
    done: int
    rounds: int | None
    round_s: float | None
    since: float | None
    sites: tuple[SiteView, ...]
    warnings: tuple[str, ...]

    def left_s(self, now: float) -> float | None:
        """Return how many seconds are left until the last round has finished; None while nothing tells.

        Args:
            now: seconds since 1970.
        """
        if self.state != "running" or self.rounds is None or self.round_s is None or self.since is None:
            return None
        left = self.rounds - self.done
        if left <= 0:
            return None
        return max(left * self.round_s - max(0.0, now - self.since), (left - 1) * self.round_s)


def snapshot(title: str, lines: Sequence[Line], status: Line, work: Mapping[str, Line]) -> Snapshot:
    """Return a run's state.

    Args:
        title: the run's name for people.
        lines: all lines of its metrics.
        status: its status.json; empty while there is none.
        work: site -> the last line of its progress, of sites on this machine.
    """
    kept = counted(lines)
    rounds = [line for line in kept if line["event"] == "aggregated"]
    own: dict[str, list[Line]] = defaultdict(list)
    for line in kept:
        own[str(line.get("site"))].append(line)
    faults = [line for line in lines if line["event"] in WARNINGS]
    named = Counter(site for line in faults for site in _named(line))
    joined = sorted({str(line["site"]) for line in kept if line["event"] in JOINED})
    return Snapshot(
        title=title,
        state=str(status.get("state", "not started")),
        phase=str(status.get("phase", "")),
        reason=str(status.get("reason", "")),
        done=int(rounds[-1]["round"]) if rounds else 0,
        rounds=int(rounds[-1]["rounds"]) if rounds else None,
        round_s=_round_s(kept),
        since=float(rounds[-1]["time"]) if rounds else None,
        sites=tuple(_site(site, own[site], status, work.get(site), named[site]) for site in joined),
        warnings=tuple(str(describe(line)) for line in faults[-LAST_WARNINGS:]),
    )


def view(run: Snapshot, now: float) -> RenderableType:
    """Return a run as a terminal shows it.

    Args:
        run: the run's state.
        now: seconds since 1970.
    """
    table = FittingTable(
        "site",
        "phase",
        "last\nround",
        "last\nDice",
        "accepted\n/gated",
        "loss, %\ns/c/g",
        "faults",
        caption="accepted/gated: pseudo-labels of the last round. s/c/g: shares of the supervised, consistency and "
        "generalist term in the gradients of the loss.",
        numbers_from=2,
    )
    for site in run.sites:
        numbers = (site.round, site.dice, site.pseudo_labels, site.shares, str(site.faults or NONE))
        table.add(site.name, site.phase, *numbers)
    parts: list[RenderableType] = [_heading(run, now)]
    parts += [table] if run.sites else []
    parts += [Text(f"! {printable(each)}", style="yellow") for each in run.warnings]
    return Group(*parts)


def _heading(run: Snapshot, now: float) -> Text:
    said = f"{run.title}: {run.state}"
    if run.rounds is not None:
        said += f", {run.done} of {run.rounds} rounds done"
    if run.state == "running" and run.phase:
        said += f", {run.phase}"
    if (left := run.left_s(now)) is not None:
        said += f", {duration(left)} left"
    heading = Text(printable(said), style="bold")
    return heading if not run.reason else heading.append(f"\n{printable(run.reason)}", style="not bold")


def duration(seconds: float) -> str:
    """Return a time for people: `about 40 s`, `about 12 min`, `about 3 h 20 min`."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 90 else f"about {minutes // 60} h {minutes % 60} min"


def _site(name: str, own: Sequence[Line], status: Line, work: Line | None, faults: int) -> SiteView:
    joined = next(line for line in reversed(own) if line["event"] in JOINED)
    trained = next((line for line in reversed(own) if line["event"] == "trained"), None)
    evaluated = next((line for line in reversed(own) if line["event"] == "evaluated"), None)
    coarse = bucketed(joined)
    return SiteView(
        name=name,
        phase=_phase(name, own, status, work),
        round=NONE if trained is None else str(trained["round"]),
        dice=NONE if evaluated is None else _dice(evaluated, coarse),
        pseudo_labels=NONE if trained is None else _pseudo_labels(trained, coarse),
        shares=NONE if trained is None else _shares(trained, coarse),
        faults=faults,
    )


def _phase(name: str, own: Sequence[Line], status: Line, work: Line | None) -> str:
    if status.get("state") == "running" and name in status.get("waiting_for", ()):
        if work is not None and work["round"] == status.get("round") and work["done"] < work["total"]:
            return f"{work['phase']} {work['done']}/{work['total']}"
        return str(status.get("phase", ""))
    last = own[-1]
    if last["event"] == "excluded":
        return f"out until {last['until']}"
    return _DONE.get(last["event"], NONE)


def _dice(evaluated: Line, coarse: bool) -> str:
    mean = mean_over_classes(evaluated, "dice")
    if mean is not None:
        return f"{mean:.3f}"
    return WITHHELD if coarse and evaluated.get("validation") else NONE


def _pseudo_labels(trained: Line, coarse: bool) -> str:
    if "accepted" not in trained:  # a private round does not say
        return WITHHELD
    return f"{count_words(trained['accepted'], coarse)}/{count_words(trained.get('gated', 0), coarse)}"


def _shares(trained: Line, coarse: bool) -> str:
    shares = gradient_shares(trained, coarse)
    if shares:
        return "/".join(f"{100 * shares[term]:.0f}" if term in shares else NONE for term in TERMS)
    return WITHHELD if trained.get("steps") else NONE


def _named(line: Line) -> Sequence[str]:
    """Return the sites that a fault names."""
    return [line["site"]] if "site" in line else line.get("names", ())


def _round_s(kept: Sequence[Line]) -> float | None:
    """Return the mean time of the last rounds: from one end to the next, or of the training alone where unknown."""
    found: list[float] = []
    before: Line | None = None
    for line in kept:
        if line["event"] == "aggregated":
            known = before is not None and before["round"] == line["round"] - 1
            found.append(line["time"] - before["time"] if known and before is not None else line["seconds"])
            before = line
        elif line["event"] == "resumed":
            before = None
    recent = found[-RECENT_ROUNDS:]
    return sum(recent) / len(recent) if recent else None
