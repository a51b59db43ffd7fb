"""Per-case scores of a run, read from the sites' storage, which they never leave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from engines.run_state import run_name
from experiments.comparison.jobs import Job
from semisam_core.errors import SemiSAMError
from semisam_core.files import read_json_lines, write_json
from semisam_core.reporting.bootstrap import CaseKey, Scores


class ScoresMissingError(SemiSAMError):
    """A completed run whose scores cannot be found."""


@dataclass(frozen=True)
class CaseScore:
    """One class of one validation case, scored in one run. `hd95_mm` is None if there is no distance."""

    site: str
    case: str
    target: str
    seed: int
    dice: float
    hd95_mm: float | None

    @property
    def key(self) -> CaseKey:
        """The case, unique over all sites."""
        return (self.site, self.case)


@dataclass(frozen=True)
class RunScores:
    """All scores of one run in its selected round, and how that round was selected."""

    scores: tuple[CaseScore, ...]
    selected_by: str


def collect_scores(job: Job) -> RunScores:
    """Return a completed run's scores; the first call copies them to the run's folder.

    Per-case scores never leave a hospital. In a comparison all storages are on the researcher's own machine, so they
    can be read in place; a study across hospitals has only means over cases.

    Raises:
        ScoresMissingError: no site's storage has any.
    """
    path = job.folder / "cases.json"
    if path.exists():
        return _read(path)
    selected = [line for line in read_json_lines(job.folder / "metrics.jsonl") if line["event"] == "selected"]
    name = run_name(job.folder)
    scores: list[CaseScore] = []
    for site, storage in job.storages.items():
        lines = read_json_lines(storage / "runs" / name / "scores.jsonl")
        chosen = (line for line in lines if selected and line["round"] == selected[-1]["round"])
        scores += _of_site(job, site, chosen)
    if not scores:
        raise ScoresMissingError(
            f"{job.title}: the run completed, but no site's storage has its scores (runs/{name}/scores.jsonl). "
            f"Remove {job.folder} and resume to run it again."
        )
    result = RunScores(tuple(scores), str(selected[-1]["by"]))
    write_json(path, {"selected_by": result.selected_by, "scores": [asdict(score) for score in scores]})
    return result


class Scored(Protocol):
    """A score of one class of one case in one run; the values are further attributes."""

    @property
    def site(self) -> str:
        """The hospital."""

    @property
    def key(self) -> CaseKey:
        """The case, unique over all sites."""

    @property
    def target(self) -> str:
        """The class."""

    @property
    def seed(self) -> int:
        """The run's seed."""


def by_case(scores: Iterable[Scored], measure: str, target: str, site: str | None = None) -> Scores:
    """Return (site, case) -> seed -> value of one class, at one site or all; missing values are left out."""
    found: dict[CaseKey, dict[int, float]] = {}
    for score in scores:
        value = getattr(score, measure)
        if score.target == target and site in (None, score.site) and value is not None:
            found.setdefault(score.key, {})[score.seed] = float(value)
    return found


def missing_distances(scores: Sequence[CaseScore], target: str, site: str | None = None) -> int:
    """Return how many scores have no distance because prediction or label is empty."""
    return sum(s.hd95_mm is None for s in scores if s.target == target and site in (None, s.site))


def _of_site(job: Job, site: str, lines: Iterable[dict[str, Any]]) -> list[CaseScore]:
    last: dict[tuple[str, str], dict[str, Any]] = {}  # a repeated round is appended again; its last line counts
    for line in lines:
        last[line["case"], line["class"]] = line
    scores = []
    for (case, target), line in last.items():
        if "dice" not in line:  # neither label nor prediction has the class
            continue
        hospital, original = job.origin(site, case)
        scores.append(CaseScore(hospital, original, target, job.seed or 0, line["dice"], line["hd95_mm"]))
    return scores


def _read(path: Path) -> RunScores:
    content = json.loads(path.read_text(encoding="utf-8"))
    return RunScores(tuple(CaseScore(**each) for each in content["scores"]), content["selected_by"])
