"""The lead's report: what it says of real runs, what it withholds, and that no image can reach it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.results import collect
from experiments.intervals import dice_by_case
from reports.lead.conduct import generalists
from reports.lead.intervals import FILE, Interval, Intervals, Row, row_of, write_intervals
from reports.lead.record import RunRecord
from reports.lead.report import REPORT, tell_of_report, write_report
from reports.lead.worth import verdict
from semisam_core.errors import ConfigError
from semisam_core.files import append_json_line, read_json_lines, write_json
from semisam_core.plan import write_plan
from tests.conftest import tiny_plan
from tests.reports.conftest import Ran
from tests.reports.pages import check_page, name_of, parsed, rows, text

ROOT = Path(__file__).resolve().parents[2]
COMPARED = "Alone and federated, worst first"
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\u202e"
READS = {
    "plan.yaml",
    "run.json",
    "metrics.jsonl",
    "status.json",
    "results.json",
    "intervals.json",
}
PRIVATE = (
    "pseudo_labels=null",
    "regularizer.name=none",
    "aggregation.weights=samples",
    "privacy={noise_multiplier: 1.5, sampling_rate: 0.5}",
)


@pytest.fixture
def copy(ran: Ran, tmp_path: Path) -> Path:
    """Return a copy of the run folder that a test may change."""
    return Path(shutil.copytree(ran.folder, tmp_path / "copy"))


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder from events, with a plan changed by assignments."""

    def make(*events: tuple[str, dict[str, Any]], plan: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / "made-up"
        folder.mkdir()
        write_plan(folder / "plan.yaml", tiny_plan(*plan))
        (folder / "metrics.jsonl").touch()
        for event, content in events:
            append_json_line(folder / "metrics.jsonl", {"event": event, "time": 1_770_000_000.0, "round": 1, **content})
        return folder

    return make


def _joined(site: str, **counts: Any) -> tuple[str, dict[str, Any]]:
    return "joined", {"site": site, "labeled": 1, "unlabeled": 2, "validation": 3, "quarantined": 0, **counts}


def test_the_page_is_valid_fetches_nothing_and_has_words_for_every_figure(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    assert len([each for each in tree.iter() if name_of(each) == "svg"]) >= 5


def test_it_has_no_image_although_pictures_lie_beside_it(copy: Path) -> None:
    (copy / "pictures").mkdir()
    (copy / "pictures" / "alpha.png").write_bytes(b"\x89PNG")
    page = write_report(copy).read_text()
    tree = check_page(page)
    assert not {name_of(each) for each in tree.iter()} & {"img", "image", "canvas", "picture", "foreignObject"}
    assert "data:image" not in page
    assert "img-src" not in page


def test_it_opens_nothing_of_a_run_but_its_text_files(copy: Path) -> None:
    """An audit hook sees every file that is opened, by whatever library."""
    code = (
        "import sys, pathlib\n"
        "from tests.semisam_core.generalists.fake import register_fake\n"
        "from reports.lead.report import write_report\n"
        "register_fake()\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == 'open' else None)\n"
        f"write_report(pathlib.Path({str(copy)!r}))\n"
        "print('\\n'.join(opened))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    opened = {Path(line).name for line in done.stdout.splitlines() if line.startswith(str(copy))}
    assert "metrics.jsonl" in opened
    assert {name for name in opened if not name.startswith(".report.html")} <= READS


def test_scores_are_those_of_the_run(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    shown = {row[0]: row for row in rows(tree, COMPARED)}
    local = {config.site: ran.folder / "local" / config.site for config in ran.sites}
    for result in collect(ran.folder, local, ran.plan.class_names):
        if result.site == "gamma":
            continue
        assert result.local_dice is not None
        assert result.federated_dice is not None
        assert shown[result.site][3].startswith(f"{result.local_dice:.3f}")
        assert shown[result.site][4].startswith(f"{result.federated_dice:.3f}")
        assert shown[result.site][5].startswith(f"{result.federated_dice - result.local_dice:+.3f}")


def test_intervals_are_given_from_enough_cases_on(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    shown = {row[0]: row for row in rows(tree, COMPARED)}
    assert "[" in shown["alpha"][4]  # of six cases
    assert "[" in shown["alpha"][5]
    assert "[" not in shown["beta"][4]  # of one
    kept = json.loads((ran.folder / FILE).read_text())["rows"]
    assert {(row["site"], row["federated"]["cases"]) for row in kept} == {(None, 7), ("alpha", 6), ("beta", 1)}
    assert [row["target"] for row in kept] == ["blob"] * 3 + [None] * 3
    assert "case-" not in (ran.folder / FILE).read_text()


def test_what_a_site_withholds_is_said_to_be_withheld_and_is_never_zero(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    compared = {row[0]: row for row in rows(tree, COMPARED)}
    assert compared["gamma"][2:] == ["1-4", "withheld", "withheld", "-", "withheld", "withheld", "withheld"]
    losses = [row for row in rows(tree, "loss terms by round") if row[0] == "gamma"]
    assert len(losses) == ran.plan.training.rounds
    assert all(set(row[2:]) == {"withheld"} for row in losses)
    pseudo = [row for row in rows(tree, "pseudo-labels by round") if row[0] == "gamma"]
    assert {row[2] for row in pseudo} <= {"0", "1-4"}
    assert {row[5] for row in pseudo} == {"withheld"}
    assert [row[2] for row in rows(tree, "Dice by round") if row[0] == "gamma"] == ["withheld"] * 2


def test_scores_on_hidden_labels_are_shown_where_a_site_sends_exact_numbers(copy: Path) -> None:
    scores = {"target": "blob", "unlabeled_scored": 2, "prompting_dice": 0.5, "pseudo_label_dice": None}
    sites = [{"site": name, **scores, "unlabeled_dice": 0.75} for name in ("alpha", "gamma")]
    write_json(copy / "results.json", {"sites": sites})
    tree = check_page(write_report(copy).read_text())
    shown = rows(tree, "Scans whose labels the study never saw, scored afterwards on this machine")
    assert shown == [["alpha", "blob", "2", "0.500", "-", "0.750"], ["gamma", "blob", *["withheld"] * 4]]


def test_sites_stand_worst_first_and_those_without_a_score_last(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    scores = {
        line["site"]: line["dice.blob"]
        for line in read_json_lines(ran.folder / "metrics.jsonl")
        if line["event"] == "evaluated" and "dice.blob" in line
    }
    assert [row[0] for row in rows(tree, COMPARED)] == [*sorted(scores, key=scores.__getitem__), "gamma"]
    assert f"blob: {min(scores, key=scores.__getitem__)} is lowest" in text(tree)


def test_text_from_elsewhere_is_shown_and_not_obeyed(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().replace('"site": "beta"', f'"site": {json.dumps(HOSTILE)}')
    (copy / "metrics.jsonl").write_text(lines)
    append_json_line(
        copy / "metrics.jsonl",
        {"event": "refused", "time": 0, "round": 1, "kind": "train", "site": HOSTILE, "reason": HOSTILE, "rule": None},
    )
    write_json(copy / "run.json", {"run": HOSTILE, "versions": {"torch": HOSTILE}})
    write_json(copy / "status.json", {"state": "failed", "reason": HOSTILE})
    page = write_report(copy).read_text()
    tree = check_page(page)
    assert "<script>alert(1)</script>" in text(tree)
    assert "{{ 7*7 }}" in text(tree)
    assert "\u202e" not in page
    assert "\\u202e" in page


def test_the_same_run_gives_the_same_bytes(copy: Path) -> None:
    assert write_report(copy).read_bytes() == write_report(copy).read_bytes()


def test_what_left_is_counted_by_site(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    left = {row[0]: row for row in rows(tree, "What left each site")}
    assert left["alpha"][1] == "join 1, update 2, scores 2"
    audited = read_json_lines(ran.site("alpha").storage.folder / "audit.jsonl")
    run = json.loads((ran.folder / "run.json").read_text())["run"]
    sent = [line for line in audited if line.get("run") == run]
    assert left["alpha"][2] == str(sum(len(line["scalars"]) for line in sent))
    assert left["alpha"][3] == f"{sum(line.get('bytes', 0) for line in sent):,}"


def test_how_to_repeat_it_is_written_down(ran: Ran) -> None:
    tree = check_page(write_report(ran.folder).read_text())
    said = text(tree)
    last = [line for line in read_json_lines(ran.folder / "metrics.jsonl") if line["event"] == "aggregated"][-1]
    versions = json.loads((ran.folder / "run.json").read_text())["versions"]
    for part in (ran.plan.hash, last["sha256"], f"torch {versions['torch']}", "steps_per_round: 2"):
        assert part in said


def test_faults_and_exclusions_are_listed(made_up: Callable[..., Path]) -> None:
    folder = made_up(
        _joined("alpha"),
        ("silent", {"sites": 1, "names": ["alpha"], "seconds": 60}),
        ("excluded", {"site": "alpha", "reason": "no reply within 60 s", "failures": 3, "until": 4}),
    )
    local = folder / "local" / "alpha"
    local.mkdir(parents=True)
    (local / "metrics.jsonl").touch()
    write_json(local / "status.json", {"state": "failed", "reason": "the disk is full"})
    write_report(folder)
    # No site was scored, so there is no figure to check words of.
    said = (folder / REPORT).read_text()
    assert "alpha did not answer within 60 s" in said
    assert "alpha is left out until round 4" in said
    assert "alpha alone did not complete (failed): the disk is full" in said
    assert "no answer" in said


def test_epsilon_is_shown_where_a_site_says_it_and_withheld_elsewhere(made_up: Callable[..., Path]) -> None:
    counts = {"labeled": 1, "unlabeled": 2, "steps": 3}
    spent = {"epsilon.round": 0.7, "epsilon.total": 1.25, "epsilon.delta": 1e-5}
    folder = made_up(
        _joined("alpha"),
        _joined("beta"),
        ("trained", {"site": "alpha", **counts, **spent}),
        ("trained", {"site": "beta", **counts}),
        ("evaluated", {"site": "alpha", "final": True, "validation": 3, "dice.blob": 0.5}),
        plan=PRIVATE,
    )
    tree = check_page(write_report(folder).read_text())
    costs = rows(tree, "What private rounds cost the patients of each site")
    assert costs == [
        ["alpha", "1", "0.70", "1.25", "1e-05"],
        ["beta", "1", "withheld", "withheld", "withheld"],
    ]
    assert {cell for row in rows(tree, "loss terms by round") for cell in row[2:]} == {"withheld"}


def test_benchmarks_that_name_what_is_segmented_stand_out(made_up: Callable[..., Path]) -> None:
    folder = made_up(
        plan=("pseudo_labels.generalists=[medsam]", "task.classes=[{name: left-atrium, value: 1}]"),
    )
    (seen,) = generalists(RunRecord.of(folder))
    assert [each for each in seen.likely if "left atrium" in each]
    assert "KiTS" in seen.overlaps
    assert "KiTS" not in seen.likely


def _scored(folder: Path, dice: dict[str, tuple[float, float]]) -> RunRecord:
    """Add (alone, federated) Dice of sites to a run folder."""
    for site, (alone, federated) in dice.items():
        event, content = _joined(site)
        append_json_line(folder / "metrics.jsonl", {"event": event, "round": 0, **content})
        local = folder / "local" / site
        for path, value in ((folder, federated), (local, alone)):
            line = {"event": "evaluated", "round": 2, "site": site, "validation": 3, "dice.blob": value}
            append_json_line(path / "metrics.jsonl", line)
        append_json_line(local / "metrics.jsonl", {"event": "selected", "round": 2, "by": "last round"})
    append_json_line(folder / "metrics.jsonl", {"event": "selected", "round": 2, "by": "last round"})
    return RunRecord.of(folder)


@pytest.mark.parametrize(
    ("low", "high", "kind", "words"),
    [
        (0.01, 0.2, "good", "Federating was worth it."),
        (-0.2, -0.01, "bad", "Training alone was better."),
        (-0.01, 0.2, "odd", "Not clear, the interval includes no difference."),
        (None, None, "odd", "too few cases for an interval, so this may be chance"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(
    made_up: Callable[..., Path], low: float | None, high: float | None, kind: str, words: str
) -> None:
    folder = made_up()
    difference = Interval(mean=0.1, low=low, high=high, cases=7)
    write_intervals(folder, Intervals(rows=(Row(site=None, target=None, difference=difference),)))
    found = verdict(_scored(folder, {"alpha": (0.5, 0.7), "beta": (0.6, 0.6)}))
    assert found.kind == kind
    assert words in found.sentence
    assert "at 1 of 2 sites" in found.sentence
    assert ("too narrow" in found.sentence) == (low is not None)  # seven cases


def test_with_sites_enough_the_interval_is_over_sites(made_up: Callable[..., Path]) -> None:
    scores = {f"site-{k}": (0.5, 0.6 + k / 100) for k in range(5)}
    found = verdict(_scored(made_up(), scores))
    assert found.kind == "good"
    assert "over 5 sites" in found.sentence


def test_a_run_without_sites_alone_does_not_claim_a_comparison(made_up: Callable[..., Path]) -> None:
    folder = made_up(_joined("alpha"), ("evaluated", {"site": "alpha", "validation": 3, "dice.blob": 0.5}))
    found = verdict(RunRecord.of(folder))
    assert "trained no site alone" in found.sentence
    tree = check_page(write_report(folder).read_text())
    assert rows(tree, COMPARED)[0][3] == "not run"


def test_an_interval_of_few_cases_is_left_out() -> None:
    few, enough = ({("a", str(k)): {0: 0.1 * k} for k in range(n)} for n in (4, 5))
    assert row_of("a", "blob", few, few).federated == Interval(mean=0.15000000000000002, low=None, high=None, cases=4)
    shown = row_of("a", "blob", enough, enough)
    assert shown.federated is not None
    assert shown.federated.low is not None
    assert shown.difference == Interval(mean=0.0, low=0.0, high=0.0, cases=5)


def test_of_several_structures_each_has_its_own_order_and_one_that_a_site_does_not_mark_has_no_score(
    made_up: Callable[..., Path],
) -> None:
    both = {"dice.liver": 0.9, "dice.spleen": 0.4, "missing_distances.spleen": 2}
    folder = made_up(
        _joined("alpha"),
        _joined("beta"),
        _joined("gamma", validation=0),
        ("evaluated", {"site": "alpha", "validation": 3, **both}),
        ("evaluated", {"site": "beta", "validation": 3, "dice.liver": 0.8}),
        plan=("task.classes=[{name: liver, value: 1}, {name: spleen, value: 2}]",),
    )
    tree = check_page(write_report(folder).read_text())
    assert [(row[0], row[1], row[4]) for row in rows(tree, COMPARED)] == [
        ("beta", "liver", "0.800"),
        ("alpha", "liver", "0.900"),
        ("gamma", "liver", "no validation scans"),
        ("alpha", "spleen", "0.400"),
        ("beta", "spleen", "no score"),
        ("gamma", "spleen", "no validation scans"),
    ]
    assert "liver: beta is lowest, Dice 0.800 against 0.850" in text(tree)


def test_an_unfinished_run_is_not_compared(made_up: Callable[..., Path]) -> None:
    folder = made_up(_joined("alpha"), ("evaluated", {"site": "alpha", "validation": 3, "dice.blob": 0.5}))
    append_json_line(
        folder / "local" / "alpha" / "metrics.jsonl", {"event": "selected", "round": 1, "by": "last round"}
    )
    assert "has not come to its end" in verdict(RunRecord.of(folder)).sentence


def test_the_mean_over_structures_is_taken_case_by_case() -> None:
    scores = {"liver": {"a": 0.5, "b": 0.75}, "spleen": {"a": 1.0}}
    assert dice_by_case(scores, None) == {"a": 0.75, "b": 0.75}
    assert dice_by_case(scores, "spleen") == {"a": 1.0}


def test_a_folder_that_is_no_run_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder of a study is here"):
        write_report(tmp_path)


def test_a_run_that_ended_before_any_site_joined_has_a_report_that_says_why(made_up: Callable[..., Path]) -> None:
    folder = made_up()
    (folder / "metrics.jsonl").unlink()
    write_json(folder / "status.json", {"state": "failed", "reason": "0 of 2 sites connected within 30 s."})
    page = write_report(folder).read_text()
    assert "0 of 2 sites connected within 30 s." in page
    parsed(page)


def test_a_report_that_cannot_be_written_does_not_end_a_run(copy: Path) -> None:
    (copy / FILE).write_text("rows: [1]")
    console = Console(record=True, width=400)
    tell_of_report(copy, console)
    said = console.export_text()
    assert "The report could not be written" in said
    assert FILE in said
