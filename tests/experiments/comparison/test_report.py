"""The report: worst site first, missing distances counted, differences signed, oracles marked."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from experiments.comparison.arms import Arm, OracleArm, Standing, What, Who
from experiments.comparison.cohorts import Cohort
from experiments.comparison.curve import draw_curve
from experiments.comparison.definition import define
from experiments.comparison.jobs import Job, seconds_left
from experiments.comparison.report import Report
from experiments.comparison.results import ArmResult, gather
from experiments.comparison.scores import CaseScore, RunScores
from experiments.comparison.unlabeled import HiddenScore
from semisam_core.files import write_json
from tests.conftest import tiny_plan

BASELINE, BETTER = Arm(Who.FEDERATED, What.SUPERVISED), Arm(Who.FEDERATED, What.SEMISAM)
DICE = {("alpha", "1"): 0.9, ("alpha", "2"): 0.8, ("beta", "1"): 0.2, ("beta", "2"): 0.4, ("gamma", "1"): 0.6}


def _cohort(folder: Path) -> Cohort:
    return Cohort("all", {"alpha": ("x",), "beta": (), "gamma": ()}, folder, {}, folder, folder, {})


def _scores(shift: float, seed: int, missing: frozenset[tuple[str, str]] = frozenset()) -> RunScores:
    scores = tuple(
        CaseScore(site, case, "blob", seed, dice + shift, None if (site, case) in missing else 10.0 - shift)
        for (site, case), dice in DICE.items()
    )
    return RunScores(scores, "last round; no label was used to select")


@pytest.fixture
def results(tmp_path: Path) -> list[ArmResult]:
    cohort = _cohort(tmp_path)
    oracle = Job(OracleArm("fake", 3), cohort, None, None, tmp_path)
    runs = {(arm, seed): Job(arm, cohort, seed, None, tmp_path) for arm in (BASELINE, BETTER) for seed in (0, 1)}
    finished = {oracle: _scores(0.05, 0)}
    finished |= {job: _scores(0.0, seed) for (arm, seed), job in runs.items() if arm == BASELINE}
    finished[runs[BETTER, 0]] = _scores(0.05, 0, frozenset({("beta", "1"), ("gamma", "1")}))
    return gather([oracle, *runs.values()], finished, ["blob"], BASELINE.name)


def test_the_worst_site_comes_first(results: list[ArmResult]) -> None:
    for result in results:
        assert [site for site, _ in result.classes[0].sites] == ["beta", "gamma", "alpha"]
    lines = _report(results).markdown().splitlines()
    first = next(number for number, line in enumerate(lines) if "federated-semisam" in line)
    assert "| beta (worst) | 2 |" in lines[first + 1]


def test_missing_distances_are_counted_and_never_zero(results: list[ArmResult]) -> None:
    better = next(result for result in results if result.arm == BETTER.name).classes[0]
    assert better.overall.missing_distances == 2
    assert better.overall.hd95_mm is not None
    assert better.overall.hd95_mm.mean == pytest.approx(9.95)
    assert better.overall.hd95_mm.cases == 3
    gamma = dict(better.sites)["gamma"]
    assert (gamma.hd95_mm, gamma.missing_distances) == (None, 1)
    assert "(2 missing)" in _report(results).markdown()


def test_a_difference_is_paired_with_the_baseline_where_both_were_scored(results: list[ArmResult]) -> None:
    better = next(result for result in results if result.arm == BETTER.name).classes[0]
    assert better.dice_difference is not None
    assert better.dice_difference.mean == pytest.approx(0.05)
    assert better.dice_difference.low == pytest.approx(0.05)
    assert (better.dice_difference.cases, better.dice_difference.values) == (5, 5)
    assert better.hd95_difference_mm is not None
    assert better.hd95_difference_mm.cases == 3
    assert "+0.050 [+0.050, +0.050]" in _report(results).markdown()


def test_an_arm_is_compared_with_the_baseline_under_the_same_label_count(tmp_path: Path) -> None:
    jobs = {}
    for setting, shift in (("1", 0.0), ("all", 0.05)):
        cohort = replace(_cohort(tmp_path), setting=setting)
        jobs[Job(BASELINE, cohort, 0, None, tmp_path)] = _scores(shift, 0)
        jobs[Job(BETTER, cohort, 0, None, tmp_path)] = _scores(shift + 0.02, 0)
    differences = [each.classes[0].dice_difference for each in gather(list(jobs), jobs, ["blob"], BASELINE.name)]
    assert [each and round(each.mean, 6) for each in differences] == [None, 0.02, None, 0.02]


def _hidden(final: float, prompting: float, pseudo_label: float | None, seed: int = 0) -> HiddenScore:
    return HiddenScore("gamma", f"scan-{prompting}", "blob", seed, prompting, pseudo_label, final)


def test_unlabeled_scans_have_a_table_of_their_own(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path)
    first, second = (Job(arm, cohort, 0, None, tmp_path) for arm in (BASELINE, BETTER))
    hidden = {
        first: [_hidden(0.50, 0.4, None), _hidden(0.60, 0.5, None)],
        second: [_hidden(0.70, 0.4, 0.55), _hidden(0.80, 0.5, None)],
    }
    finished = {first: _scores(0.0, 0), second: _scores(0.0, 0)}
    results = gather([first, second], finished, ["blob"], BASELINE.name, hidden)
    (baseline,), (better,) = (result.unlabeled for result in results)
    assert (baseline.final.mean, baseline.final_difference, baseline.pseudo_label) == (pytest.approx(0.55), None, None)
    assert better.final_difference is not None
    assert (better.final_difference.mean, better.final_difference.cases) == (pytest.approx(0.2), 2)
    assert better.pseudo_label is not None
    assert better.gain is not None
    assert (better.pseudo_label.mean, better.gain.mean, better.gain.cases) == (0.55, pytest.approx(0.15), 1)
    report = _report(results).markdown()
    assert (
        "| federated-semisam | all | blob | 2 | 0.750 [0.700, 0.800] | +0.200 [+0.200, +0.200] | 0.550 | +0.150 |"
        in report
    )
    assert "for analysis only" in report


def test_without_labels_of_unlabeled_scans_there_is_no_such_table(results: list[ArmResult]) -> None:
    assert "nlabeled scans" not in _report(results).markdown()


@pytest.mark.parametrize("width", [60, 80, 250])
def test_the_report_is_whole_at_any_width(results: list[ArmResult], width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    _report(results).show(console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    intervals = [line for line in lines if "0.580 [" in line]
    assert intervals
    listed = [line.strip() for line in lines if line.strip().startswith("Dice: ")]
    assert all(re.fullmatch(r"Dice: \d\.\d{3}( \[\d\.\d{3}, \d\.\d{3}\])?", line) for line in listed)
    assert any("beta (worst)" in line for line in lines)
    if width < 100:
        assert "arm: federated-supervised (baseline)" in [line.rstrip() for line in lines]


def test_an_oracle_comes_last_and_is_marked_and_has_no_difference(results: list[ArmResult]) -> None:
    assert results[-1].standing is Standing.ORACLE
    assert results[-1].classes[0].dice_difference is None
    console = Console(file=io.StringIO(), width=300)
    _report(results).show(console)
    assert isinstance(console.file, io.StringIO)
    assert "oracle-fake-3-points (oracle: prompted with the truth, an upper bound)" in console.file.getvalue()


def test_runs_without_scores_are_named(results: list[ArmResult]) -> None:
    assert "since they have no scores: federated-semisam, labels all, seed 1." in _report(results).markdown()


def test_an_arm_without_scores_has_a_row_that_says_so(tmp_path: Path) -> None:
    results = gather([Job(BASELINE, _cohort(tmp_path), 0, None, tmp_path)], {}, ["blob"], BASELINE.name)
    assert "| federated-supervised | all | - | no scores |" in _report(results).markdown()


def test_time_left_comes_from_runs_of_the_same_arm_or_else_of_any_that_trains(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path)
    jobs = [
        Job(arm, cohort, seed, None, tmp_path / f"{arm.name}{seed}") for arm in (BASELINE, BETTER) for seed in (0, 1)
    ]
    oracle = Job(OracleArm("fake", None), cohort, None, None, tmp_path / "oracle")
    assert seconds_left(jobs) is None
    for job, seconds in ((jobs[0], 100.0), (oracle, 1.0)):
        write_json(job.folder / "status.json", {"state": "completed"})
        job.add_seconds(seconds)
    assert seconds_left([oracle, *jobs]) == 300
    write_json(jobs[2].folder / "status.json", {"state": "completed"})
    jobs[2].add_seconds(20.0)
    jobs[3].add_seconds(5.0)
    assert seconds_left([oracle, *jobs]) == 100 + 15


def test_label_counts_with_the_same_total_can_be_plotted(results: list[ArmResult], tmp_path: Path) -> None:
    plan = tiny_plan()
    definition = define({"arms": [BASELINE.name, BETTER.name], "labeled": ["1", "all"]}, plan, "comparison")
    draw_curve([*results, *results], plan, definition, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def _report(results: list[ArmResult]) -> Report:
    plan = tiny_plan()
    definition = define({"arms": [BASELINE.name, BETTER.name], "seeds": [0, 1]}, plan, "comparison")
    return Report(plan, definition, results)
