"""Per-case scores as they are read from the sites' storage: the selected round, the last line of each case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.comparison.arms import Arm, What, Who
from experiments.comparison.cohorts import Cohort
from experiments.comparison.jobs import Job
from experiments.comparison.scores import CaseScore, ScoresMissingError, by_case, collect_scores, missing_distances
from semisam_core.files import append_json_line, write_json

RUN = "study-1"


def _line(round_number: int, case: str, dice: float | None, hd95_mm: float | None = 1.0) -> dict[str, Any]:
    scored = {} if dice is None else {"dice": dice, "hd95_mm": hd95_mm}
    return {"round": round_number, "case": case, "class": "blob", **scored}


def _job(folder: Path, who: Who, lines: dict[str, list[dict[str, Any]]], selected: int | None = 2) -> Job:
    storages = {site: folder / "storage" / site for site in lines}
    origin = {"alpha--x": ("alpha", "x"), "beta--x": ("beta", "x")}
    pooled = folder / "storage" / "pooled"
    cohort = Cohort("all", dict.fromkeys(lines, ("l",)), folder, storages, folder, pooled, origin)
    job = Job(Arm(who, What.SUPERVISED), cohort, 7, None, folder / "run")
    write_json(job.folder / "run.json", {"run": RUN})
    for number in () if selected is None else (1, selected):  # a resumed study selects again; the last one counts
        append_json_line(job.folder / "metrics.jsonl", {"event": "selected", "round": number, "by": "last round"})
    for site, each in lines.items():
        for line in each:
            append_json_line(folder / "storage" / site / "runs" / RUN / "scores.jsonl", line)
    return job


def test_only_the_selected_round_counts_and_a_repeated_case_counts_once(tmp_path: Path) -> None:
    lines = {
        "alpha": [_line(1, "x", 0.1), _line(2, "x", 0.2), _line(3, "x", 0.3), _line(2, "x", 0.4)],
        "beta": [_line(2, "x", 0.5), _line(2, "absent", None), _line(2, "y", 0.0, None)],
    }
    found = collect_scores(_job(tmp_path, Who.FEDERATED, lines))
    assert found.selected_by == "last round"
    assert found.scores == (
        CaseScore("alpha", "x", "blob", 7, 0.4, 1.0),
        CaseScore("beta", "x", "blob", 7, 0.5, 1.0),
        CaseScore("beta", "y", "blob", 7, 0.0, None),
    )


def test_cases_of_the_pooled_site_are_scored_under_their_own_sites(tmp_path: Path) -> None:
    lines = {"pooled": [_line(2, "alpha--x", 0.4), _line(2, "beta--x", 0.5)]}
    found = collect_scores(_job(tmp_path, Who.POOLED, lines))
    assert [score.key for score in found.scores] == [("alpha", "x"), ("beta", "x")]


def test_scores_are_kept_with_the_run_when_a_storage_is_emptied(tmp_path: Path) -> None:
    job = _job(tmp_path, Who.FEDERATED, {"alpha": [_line(2, "x", 0.4)]})
    first = collect_scores(job)
    (tmp_path / "storage" / "alpha" / "runs" / RUN / "scores.jsonl").unlink()
    assert collect_scores(job) == first


@pytest.mark.parametrize("selected", [None, 3])
def test_a_completed_run_without_scores_says_what_to_do(tmp_path: Path, selected: int | None) -> None:
    job = _job(tmp_path, Who.FEDERATED, {"alpha": [_line(2, "x", 0.4)]}, selected)
    with pytest.raises(ScoresMissingError, match=r"Remove .*/run and resume to run it again"):
        collect_scores(job)


def test_values_are_grouped_by_case_and_seed_and_missing_ones_are_left_out() -> None:
    scores = [CaseScore("alpha", "x", "blob", seed, 0.5 + seed / 10, None if seed else 4.0) for seed in (0, 1)] + [
        CaseScore("beta", "x", "blob", 0, 0.9, 2.0),
        CaseScore("beta", "x", "other", 0, 0.1, None),
    ]
    assert by_case(scores, "dice", "blob") == {("alpha", "x"): {0: 0.5, 1: 0.6}, ("beta", "x"): {0: 0.9}}
    assert by_case(scores, "hd95_mm", "blob") == {("alpha", "x"): {0: 4.0}, ("beta", "x"): {0: 2.0}}
    assert by_case(scores, "dice", "blob", "beta") == {("beta", "x"): {0: 0.9}}
    assert (missing_distances(scores, "blob"), missing_distances(scores, "blob", "beta")) == (1, 0)
