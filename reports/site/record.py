"""What a site's storage says of one run: scores of single cases, gates, sources, quarantine, what left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from client.audit_check import read_entries
from client.audit_log import AuditLog
from client.site_config import SiteConfig
from semisam_core.configuration import NAME_ACCEPTED, is_name
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CaseScore:
    """One class of one validation case; distances are None where prediction or label is empty."""

    case: str
    target: str
    dice: float
    hd95_mm: float | None
    surface_dice: float | None


@dataclass(frozen=True)
class SiteRun:
    """What a site has stored of one run.

    Attributes:
        config: the site's YAML.
        plan: the study plan.
        run: the run's name.
        folder: the run's folder in the site's storage.
        scores: scores of single cases, all rounds.
        gates: accepted and refused pseudo-labels by round and class.
        sources: how much each source counted in each pseudo-label that taught.
        quarantine: the cases that could not be used.
        audit: what left under this run.
    """

    config: SiteConfig
    plan: Plan
    run: str
    folder: Path
    scores: Lines
    gates: Lines
    sources: Lines
    quarantine: Lines
    audit: Lines

    @classmethod
    def of(cls, config: SiteConfig, plan: Plan, run: str | None = None) -> SiteRun:
        """Read what a site has of a run; by default of the last one under this plan.

        Raises:
            ConfigError: there is no such run here.
            OSError: a file cannot be read.
        """
        entries = list(read_entries(AuditLog(config.storage.folder / "audit.jsonl")))
        name = _last_run(entries, plan, config) if run is None else run
        if not is_name(name):
            raise ConfigError(f"--run {name!r}: a run's name has {NAME_ACCEPTED}.")
        folder = config.storage.folder / "runs" / name
        if not folder.is_dir():
            known = ", ".join(sorted(path.name for path in folder.parent.glob("*"))) or "none"
            raise ConfigError(f"--run {name}: the site {config.site} has stored nothing of it. Runs here: {known}.")
        return cls(
            config=config,
            plan=plan,
            run=name,
            folder=folder,
            scores=read_json_lines(folder / "scores.jsonl"),
            gates=read_json_lines(folder / "gates.jsonl"),
            sources=[line for line in read_json_lines(folder / "evidence.jsonl") if line.get("round") is not None],
            quarantine=_quarantine(folder / "quarantine.json"),
            audit=[entry for entry in entries if entry.get("run") == name],
        )

    @cached_property
    def scored_rounds(self) -> list[int]:
        """The rounds whose specialist was scored here."""
        return sorted({int(line["round"]) for line in self.scores})

    def scores_in(self, number: int) -> list[CaseScore]:
        """Return a round's scores, the lowest Dice first. A round that was repeated counts once."""
        last = {(line["case"], line["class"]): line for line in self.scores if line["round"] == number}
        found = [
            CaseScore(case, target, line["dice"], line["hd95_mm"], line["surface_dice"])
            for (case, target), line in last.items()
            if "dice" in line
        ]
        return sorted(found, key=lambda score: (score.dice, score.case, score.target))

    @property
    def final_scores(self) -> list[CaseScore]:
        """The scores of the last scored round; none if no round was scored."""
        return self.scores_in(self.scored_rounds[-1]) if self.scored_rounds else []


def _last_run(entries: Lines, plan: Plan, config: SiteConfig) -> str:
    runs = [str(entry["run"]) for entry in entries if entry.get("plan") == plan.hash and entry.get("run")]
    if not runs:
        raise ConfigError(
            f"{config.storage.folder}: the site {config.site} has answered nothing under this plan (hash {plan.hash}). "
            "Give the plan that the run was started with, or name a run with --run."
        )
    return runs[-1]


def _quarantine(path: Path) -> Lines:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else []
