"""What a terminal shows of a run: the picture of a snapshot, and following a run beside its own process."""

from __future__ import annotations

import io
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.following import RunFollower
from engines.monitor import RunMonitor
from engines.run_view import duration, snapshot, view
from semisam_core.files import append_json_line, write_json
from server.run_folder import RunFolder

NORMS = {"gradient.supervised": 3.0, "gradient.consistency": 0.5, "gradient.generalist": 1.0}
COUNTS = {"labeled": 1, "unlabeled": 8, "validation": 2, "quarantined": 0}
Lines = list[dict[str, Any]]


def _event(kind: str, at: float, **content: Any) -> dict[str, Any]:
    return {"event": kind, "time": at, **content}


def _lines(rounds: int = 3, of: int = 10) -> Lines:
    """Return a run of three sites with a minute a round; the one called east sends buckets and withholds."""
    lines = [
        _event("joined", 0.0, round=0, site="north-hospital", **COUNTS),
        _event("joined", 0.0, round=0, site="south", **COUNTS),
        _event("joined", 0.0, round=0, site="east", counts="buckets", **COUNTS),
    ]
    for number in range(1, rounds + 1):
        end = 60.0 * number
        sent = {"round": number, "labeled": 1, "steps": 30, "accepted": 10, "gated": 5}
        lines += [_event("trained", end - 5, site=site, **sent, **NORMS) for site in ("north-hospital", "south")]
        lines += [_event("trained", end - 5, site="east", **sent)]
        lines += [_event("aggregated", end, round=number, rounds=of, seconds=50.0, weights={})]
        for site in ("north-hospital", "south"):
            lines += [_event("evaluated", end + 5, round=number, site=site, validation=2, **{"dice.a": number / 10})]
        lines += [_event("evaluated", end + 5, round=number, site="east", validation=1)]
    return lines


def _status(number: int, *waiting_for: str, phase: str = "training") -> dict[str, Any]:
    return {"state": "running", "phase": phase, "round": number, "waiting_for": list(waiting_for), "reason": ""}


def _shown(lines: Lines, status: dict[str, Any], now: float = 200.0, width: int = 120, **work: Any) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(view(snapshot("federated", lines, status, work), now))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_fits_the_terminal(width: int) -> None:
    late = _event("late", 186.0, round=3, site="south", seconds=31.0)
    work = {"north-hospital": {"round": 4, "phase": "pseudo-label", "done": 12, "total": 30}}
    text = _shown([*_lines(), late], _status(4, "north-hospital", "east"), width=width, **work)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == "federated: running, 3 of 10 rounds done, training, about 6 min left"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("north", "south", "east"))}
    assert rows == {
        "east": ["training", "3", "withheld", "10-19/5-9", "withheld", "-"],
        "north-hospital": ["pseudo-label", "12/30", "3", "0.300", "10/5", "67/11/22", "-"],
        "south": ["late", "3", "0.300", "10/5", "67/11/22", "1"],
    }
    assert lines[-1] == "! round 3: the reply of south came 31 s late and is not used"


def test_a_terminal_too_narrow_for_the_table_gets_a_list() -> None:
    text = _shown(_lines(), _status(4), width=50)
    assert "site: north-hospital\n" in text
    assert "  loss, % s/c/g: 67/11/22\n" in text


def test_nothing_is_said_of_the_time_left_until_a_round_has_finished() -> None:
    assert "left" not in _shown(_lines(0), _status(1))
    assert "3 of 3 rounds done" in _shown(_lines(3, of=3), _status(3, phase="evaluating"))
    assert "left" not in _shown(_lines(3, of=3), _status(3, phase="evaluating"))
    assert "left" not in _shown(_lines(), {"state": "failed", "reason": "no site is left"}).splitlines()[0]
    assert "no site is left" in _shown(_lines(), {"state": "failed", "reason": "no site is left"})


def test_the_time_left_is_that_of_the_last_rounds_and_runs_down() -> None:
    run = snapshot("x", _lines(3), _status(4), {})
    whole = 7 * (50 + 60 + 60) / 3  # the first round says only how long its training took
    assert run.left_s(180.0) == pytest.approx(whole)
    assert run.left_s(200.0) == pytest.approx(whole - 20)
    assert run.left_s(10_000.0) == pytest.approx(whole * 6 / 7)  # this round takes longer; the others are still to come


def test_a_run_that_waited_to_be_resumed_is_not_slower_for_it() -> None:
    later = [_event("resumed", 90_000.0, round=3)]
    later += [_event("aggregated", 90_060.0, round=4, rounds=10, seconds=60.0, weights={})]
    run = snapshot("x", [*_lines(3), *later], _status(5), {})
    assert run.left_s(90_060.0) == pytest.approx(6 * (50 + 60 + 60 + 60) / 4)


@pytest.mark.parametrize(
    ("seconds", "words"), [(40.2, "about 40 s"), (600, "about 10 min"), (12_000, "about 3 h 20 min")]
)
def test_times_are_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_every_moment_of_a_run_can_be_shown() -> None:
    lines = _lines()
    for end in range(len(lines) + 1):
        for status in ({}, {"state": "not started"}, _status(2, "south"), {"state": "completed", "reason": ""}):
            assert _shown(lines[:end], status).startswith("federated: ")


@pytest.mark.parametrize(
    ("event", "content", "phase"),
    [
        ("left", {"reason": "x"}, "left"),
        ("refused", {"reason": "x"}, "left out"),
        ("excluded", {"until": 7, "reason": "x"}, "out until 7"),
        ("rejoined", COUNTS, "joined"),
        ("evaluated", {"dice.a": 0.5}, "scored"),
    ],
)
def test_a_site_that_is_not_waited_for_shows_what_it_did_last(event: str, content: dict[str, Any], phase: str) -> None:
    run = snapshot("x", [*_lines(), _event(event, 190.0, round=4, site="south", **content)], _status(4, "east"), {})
    assert {site.name: site.phase for site in run.sites}["south"] == phase


def test_a_site_that_has_not_begun_a_phase_does_not_show_the_end_of_the_one_before() -> None:
    trained = {"south": {"round": 3, "phase": "train", "done": 30, "total": 30}}
    run = snapshot("x", _lines(), _status(3, "south", phase="evaluating"), trained)
    assert {site.name: site.phase for site in run.sites}["south"] == "evaluating"


def test_a_term_that_a_plan_does_not_have_is_no_term_that_teaches_nothing() -> None:
    sent = {"round": 1, "steps": 3, "gradient.supervised": 2.0, "gradient.consistency": 0.0}
    run = snapshot("x", [*_lines(0), _event("trained", 1.0, site="south", **sent)], _status(1), {})
    assert {site.name: site.shares for site in run.sites}["south"] == "100/0/-"


def test_a_fault_counts_for_every_site_that_it_names() -> None:
    silent = _event("silent", 190.0, round=4, sites=2, names=["south", "east"], seconds=60.0)
    run = snapshot("x", [*_lines(), silent], _status(4), {})
    assert {site.name: site.faults for site in run.sites} == {"east": 1, "north-hospital": 0, "south": 1}


def test_what_a_resumed_run_repeats_is_not_shown_before_it_has_happened_again() -> None:
    run = snapshot("x", [*_lines(3), _event("resumed", 300.0, round=2)], _status(3), {})
    assert run.done == 2
    assert {site.round for site in run.sites} == {"2"}


def test_text_from_elsewhere_cannot_steer_the_terminal() -> None:
    hostile = _event("not-logged", 190.0, logger="TensorBoard", reason="\x1b[2J\x1b]0;owned\x07")
    text = _shown([*_lines(), hostile], _status(4))
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_files_that_are_missing_torn_or_being_written_are_read_when_they_are_whole(tmp_path: Path) -> None:
    follower = RunFollower(tmp_path / "run", {"south": tmp_path / "storage"})
    assert (follower.news(), follower.status(), follower.work()) == ([], {}, {})
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    (tmp_path / "run" / "status.json").write_text('{"state": "runn')
    path.write_text('{"event": "resumed", "round": 1}\n{"event": "aggr')
    assert follower.status() == {}
    assert [line["event"] for line in follower.news()] == ["resumed"]
    with path.open("a") as file:
        file.write('egated", "round": 2}\nnull\n[1]\n{"torn\n{"event": "selected", "round": 2}\n')
    assert [line["event"] for line in follower.news()] == ["aggregated", "selected"]
    assert [line["event"] for line in follower.lines] == ["resumed", "aggregated", "selected"]
    write_json(tmp_path / "run" / "run.json", {"run": "r"})
    append_json_line(tmp_path / "storage" / "runs" / "r" / "progress.jsonl", {"round": 1, "phase": "train"})
    with (tmp_path / "storage" / "runs" / "r" / "progress.jsonl").open("a") as file:
        file.write('{"round": 1, "pha')
    assert follower.work() == {"south": {"round": 1, "phase": "train"}}


def _write_a_run(folder: Path) -> None:
    record = RunFolder(folder)
    for line in _lines(20, of=20):
        content = {key: value for key, value in line.items() if key not in ("event", "time")}
        record.set_status("running", run="r", phase="training", round=content["round"], waiting_for=["south"])
        record.record(line["event"], **content)
    record.set_status("completed", run="r")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_of_another_process_is_shown_to_its_end(terminal: bool, tmp_path: Path) -> None:
    """Its files are replaced and appended to all the while; without a terminal each event is one line, none is lost."""
    said = io.StringIO()
    console = Console(file=said, width=100, force_terminal=terminal, color_system=None)
    process = multiprocessing.get_context("fork").Process(target=_write_a_run, args=(tmp_path,))
    with RunMonitor("federated", tmp_path, {}, console) as monitor:
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            monitor.tick()
    assert process.exitcode == 0
    text = said.getvalue()
    for number in range(1, 21):
        assert text.count(f"round {number}/20 aggregated") == 1
        assert text.count(f"round {number}: south Dice a {number / 10:.3f}") == 1
    assert ("federated: completed, 20 of 20 rounds done" in text) == terminal
    assert ("loss, %" in text) == terminal


def test_what_happened_before_is_shown_in_the_view_and_not_said_again(tmp_path: Path) -> None:
    _write_a_run(tmp_path)
    said = io.StringIO()
    with RunMonitor("federated", tmp_path, {}, Console(file=said, width=100, force_terminal=True), below="The study"):
        pass
    assert "aggregated after" not in said.getvalue()
    assert "20 of 20 rounds done" in said.getvalue()
    assert "The study" in said.getvalue()
