"""What each case scored in a run, read where it stays: in the storage of the sites."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.run_state import run_name
from experiments.comparison.jobs import Job
from semisam_core.errors import SemiSAMError
from semisam_core.files import read_json_lines, write_json
from semisam_core.reporting.bootstrap import CaseKey, Scores


class ScoresMissingError(SemiSAMError):
    """A finished run whose scores are nowhere."""


@dataclass(frozen=True)
class CaseScore:
    """One class of one validation case, scored in one run. `hd95_mm` is None where there is no distance."""

    site: str
    case: str
    target: str
    seed: int
    dice: float
    hd95_mm: float | None

    @property
    def key(self) -> CaseKey:
        """The case among all sites' cases."""
        return (self.site, self.case)


@dataclass(frozen=True)
class RunScores:
    """All scores of one run, in the round that its plan's selection picked, and what it was picked by."""

    scores: tuple[CaseScore, ...]
    selected_by: str


def collect_scores(job: Job) -> RunScores:
    """Return a finished run's scores; they are copied to its folder the first time.

    Scores of cases never leave a hospital. Here all storages are on the researcher's own machine, so they may be read
    in place; a study across hospitals has the means over cases only.

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
            f"{job.title}: the run is complete, but no site's storage has scores of it (runs/{name}/scores.jsonl). "
            f"Remove {job.folder} and resume to run it again."
        )
    result = RunScores(tuple(scores), str(selected[-1]["by"]))
    write_json(path, {"selected_by": result.selected_by, "scores": [asdict(score) for score in scores]})
    return result


def by_case(scores: Iterable[CaseScore], measure: str, target: str, site: str | None = None) -> Scores:
    """Return (site, case) -> seed -> value of one class, of one site or all; values that are missing are left out."""
    found: dict[CaseKey, dict[int, float]] = {}
    for score in scores:
        value = getattr(score, measure)
        if score.target == target and site in (None, score.site) and value is not None:
            found.setdefault(score.key, {})[score.seed] = float(value)
    return found


def missing_distances(scores: Sequence[CaseScore], target: str, site: str | None = None) -> int:
    """Return how many scores have no distance, since prediction or label is empty."""
    return sum(s.hd95_mm is None for s in scores if s.target == target and site in (None, s.site))


def _of_site(job: Job, site: str, lines: Iterable[dict[str, Any]]) -> list[CaseScore]:
    last: dict[tuple[str, str], dict[str, Any]] = {}  # a round that was asked for again is written again
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
