"""What a run folder says, read from its text files alone: plan, metrics, status. No image or tensor is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.results import scores_of
from engines.run_state import run_reason, run_state
from reports.lead.intervals import Intervals, read_intervals
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan, load_plan
from server.metrics_log import bucketed, counted

Lines = Sequence[Mapping[str, Any]]


class Missing(StrEnum):
    """Why a number is not there. None of these is a zero."""

    WITHHELD = "withheld"
    NOTHING_TO_SCORE = "no validation scans"
    NOT_SCORED = "no score"
    UNHEARD = "no answer"
    NO_LABELS = "no labels to train on"
    NOT_RUN = "not run"


Value = float | Missing


@dataclass(frozen=True)
class SiteRecord:
    """What a run knows of one site.

    Attributes:
        name: the site.
        joined: the counts that it last joined with.
        trained: round -> what came with its update.
        evaluated: round -> its scores.
        scored: its scores in the round that the study selected; None without any.
        alone: its scores from training alone, in that run's selected round; None if it sent none.
        alone_evaluated: likewise by round.
        alone_run: whether the run trained it alone.
    """

    name: str
    joined: Mapping[str, Any]
    trained: Mapping[int, Mapping[str, Any]]
    evaluated: Mapping[int, Mapping[str, Any]]
    scored: Mapping[str, Any] | None
    alone: Mapping[str, Any] | None
    alone_evaluated: Mapping[int, Mapping[str, Any]]
    alone_run: bool

    @property
    def coarse(self) -> bool:
        """Whether it sends buckets and rounded numbers, and withholds what is about few patients."""
        return bucketed(self.joined)

    def federated_score(self, key: str) -> Value:
        """Return a score of the federated specialist, or why there is none."""
        return self.score(self.scored, key)

    def alone_score(self, key: str) -> Value:
        """Return a score of the specialist that the site trained alone, or why there is none."""
        if not self.alone_run:
            return Missing.NO_LABELS if not self.joined.get("labeled") else Missing.NOT_RUN
        return self.score(self.alone, key)

    def score(self, line: Mapping[str, Any] | None, key: str) -> Value:
        """Return a score from a line of scores, or why there is none."""
        if not self.joined.get("validation"):
            return Missing.NOTHING_TO_SCORE
        if line is None:
            return Missing.UNHEARD
        if key in line:
            return float(line[key])
        if self.coarse or not any(name.startswith("dice.") for name in line):
            return Missing.WITHHELD
        return Missing.NOT_SCORED

    def mean_dice(self, line: Mapping[str, Any] | None, classes: Sequence[str]) -> Value:
        """Return the mean Dice over the classes that a line of scores has, or why there is none."""
        found = [self.score(line, f"dice.{name}") for name in classes]
        values = [value for value in found if not isinstance(value, Missing)]
        if values:
            return sum(values) / len(values)
        return found[0] if found else Missing.NOT_SCORED


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        folder: the run folder.
        plan: the study plan.
        about: run.json: the run's name, the plan's hash, versions.
        lines: the lines of the metrics that count.
        everything: all of them, also those that a resumed run has repeated.
        alone: site -> the lines of the run in which it trained alone.
        alone_ends: likewise, how that run ended and why.
        intervals: over single cases, where those were on one machine.
        results: results.json, by site and class.
    """

    folder: Path
    plan: Plan
    about: Mapping[str, Any]
    lines: Lines
    everything: Lines
    alone: Mapping[str, Lines]
    alone_ends: Mapping[str, tuple[str, str]]
    intervals: Intervals
    results: Lines

    @classmethod
    def of(cls, folder: Path) -> RunRecord:
        """Read a run folder.

        Raises:
            ConfigError: it is none, or a file in it is damaged.
        """
        begun = any((folder / name).is_file() for name in ("status.json", "metrics.jsonl"))
        if not begun or not (folder / "plan.yaml").is_file():
            raise ConfigError(
                f"{folder}: no run folder of a study is here (plan.yaml or status.json is missing). `semisam simulate` "
                "and `semisam lead run` print where theirs is."
            )
        everything = read_json_lines(folder / "metrics.jsonl")
        local = sorted(path.parent for path in (folder / "local").glob("*/metrics.jsonl"))
        return cls(
            folder=folder,
            plan=load_plan(folder / "plan.yaml"),
            about=_json(folder / "run.json"),
            lines=counted(everything),
            everything=everything,
            alone={path.name: counted(read_json_lines(path / "metrics.jsonl")) for path in local},
            alone_ends={path.name: (run_state(path), run_reason(path)) for path in local},
            intervals=read_intervals(folder),
            results=_json(folder / "results.json").get("sites", []),
        )

    @property
    def state(self) -> str:
        """The run's state: not started, running, completed or failed."""
        return run_state(self.folder)

    @property
    def reason(self) -> str:
        """Why the run failed."""
        return run_reason(self.folder)

    @cached_property
    def rounds(self) -> Lines:
        """One line for each finished round."""
        return [line for line in self.lines if line["event"] == "aggregated"]

    @cached_property
    def selected(self) -> Mapping[str, Any] | None:
        """Which round was published and how it was chosen; None if the study has not come that far."""
        return next((line for line in reversed(self.lines) if line["event"] == "selected"), None)

    @cached_property
    def scored_round(self) -> int | None:
        """The round whose scores are shown: the published one, else the last that was scored."""
        if self.selected is not None:
            return int(self.selected["round"])
        return max((int(line["round"]) for line in self.lines if line["event"] == "evaluated"), default=None)

    @cached_property
    def sites(self) -> tuple[SiteRecord, ...]:
        """All sites that ever joined, the lowest federated Dice first; those without a score come last."""
        joined = {line["site"]: line for line in self.lines if line["event"] in ("joined", "rejoined")}
        found = [self._site(name, line) for name, line in sorted(joined.items())]
        return tuple(sorted(found, key=lambda site: _rank(site.mean_dice(site.scored, self.plan.class_names))))

    def _site(self, name: str, joined: Mapping[str, Any]) -> SiteRecord:
        evaluated = _by_round(self.lines, "evaluated", name)
        alone = self.alone.get(name, ())
        return SiteRecord(
            name=name,
            joined=joined,
            trained=_by_round(self.lines, "trained", name),
            evaluated=evaluated,
            scored=None if self.scored_round is None else evaluated.get(self.scored_round),
            alone=scores_of(alone).get(name),
            alone_evaluated=_by_round(alone, "evaluated", name),
            alone_run=name in self.alone,
        )


def _by_round(lines: Lines, event: str, site: str) -> dict[int, Mapping[str, Any]]:
    return {int(line["round"]): line for line in lines if (line["event"], line.get("site")) == (event, site)}


def _rank(value: Value) -> tuple[bool, float]:
    return (True, 0.0) if isinstance(value, Missing) else (False, value)


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping; empty without the file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: this file cannot be read ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping is expected.")
    return content
