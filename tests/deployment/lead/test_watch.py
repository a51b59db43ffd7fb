"""`semisam lead status --watch`: beside a run in another process, to its end, without touching it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from cli.errors import readable_errors
from deployment.lead.run import RunRecord
from deployment.lead.status import status_of
from deployment.lead.study_folder import StudyFolder
from deployment.lead.watch import changes, watch
from engines.run_state import run_state
from semisam_core.files import read_json_lines, write_atomically
from server.run_folder import RunFolder
from tests.deployment.lead.conftest import call, wait_until

ROUNDS = 8
COUNTS = {"labeled": 1, "unlabeled": 8, "validation": 2, "quarantined": 0}


@pytest.fixture
def folder(study: StudyFolder) -> Path:
    """Return the folder of a run that has been submitted and has not begun."""
    folder = study.runs / "a-run"
    folder.mkdir()
    write_atomically(folder / "plan.yaml", study.plan_path.read_bytes())
    RunRecord(created=1.0, sites=2, code_hash="0" * 64).write(folder)
    return folder


def _run(folder: Path, end: str) -> None:
    """Do what a ServerApp does to its run folder."""
    record = RunFolder(folder)
    record.set_status("running", run="r")
    record.record("joined", round=0, site="north", **COUNTS)
    for number in range(1, ROUNDS + 1):
        record.set_status("running", run="r", phase="training", round=number, waiting_for=["north"])
        record.record("trained", round=number, site="north", steps=30, accepted=6, gated=2)
        record.record("aggregated", round=number, rounds=ROUNDS, seconds=0.2, weights={})
        record.record("evaluated", round=number, site="north", validation=2, **{"dice.a": number / 10})
        time.sleep(0.25)
    record.set_status(end, "the disk is full" if end == "failed" else "", run="r")


def _status(study: StudyFolder) -> dict[str, Any]:
    """Return the status as it is while a SuperLink runs that has this run."""
    found = status_of(study)
    found["superlink"] |= {"running": True, "pid": 1}
    state = run_state(Path(found["run"]["folder"]))
    found["run"] |= {"state": "starting" if state == "not started" else state, "reason": ""}
    return found


class _Running:
    """A run in a process of its own."""

    def __init__(self, folder: Path, end: str) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, end))

    def __enter__(self) -> Any:
        self.process.start()
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.join(60)
        assert self.process.exitcode == 0


def _watched(study: StudyFolder, terminal: bool) -> str:
    said = io.StringIO()
    console = Console(file=said, width=110, force_terminal=terminal, color_system=None)
    watch(study, console, False, _status, ask_every_s=0.5)
    return said.getvalue()


def test_without_a_terminal_every_event_is_one_line_and_the_end_is_said(study: StudyFolder, folder: Path) -> None:
    with _Running(folder, "completed"):
        text = _watched(study, terminal=False)
    for number in range(1, ROUNDS + 1):
        assert text.count(f"round {number}/{ROUNDS} aggregated") == 1
        assert text.count(f"round {number}: north Dice a {number / 10:.3f}") == 1
    assert "\x1b" not in text
    assert text.splitlines()[-1] == f"Run {folder}: completed."


def test_a_watch_ends_with_its_run_and_not_at_the_next_question(study: StudyFolder, folder: Path) -> None:
    began = time.monotonic()
    with _Running(folder, "completed"):
        watch(study, Console(file=io.StringIO()), False, _status, ask_every_s=30.0)
    assert time.monotonic() - began < 20


def test_on_a_terminal_one_view_is_kept_up_to_date(study: StudyFolder, folder: Path) -> None:
    with _Running(folder, "failed"):
        text = _watched(study, terminal=True)
    assert f"{study.settings.name}: failed, {ROUNDS} of {ROUNDS} rounds done" in text
    assert "0.800" in text
    assert "Sites connect to" in text
    assert "the disk is full" in text


def _watch_as_typed(study: StudyFolder, left: Any) -> None:
    with io.StringIO() as said:
        try:
            with readable_errors("The run is left alone."):
                watch(study, Console(file=said, force_terminal=True), False, _status, ask_every_s=0.5)
        except typer.Exit as error:
            left.value = error.exit_code


def test_ctrl_c_ends_watching_and_leaves_the_run_alone(study: StudyFolder, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    left = context.Value("i", -1)
    watching = context.Process(target=_watch_as_typed, args=(study, left))
    with _Running(folder, "completed") as running:
        watching.start()
        assert wait_until(lambda: len(read_json_lines(folder / "metrics.jsonl")) > 4)
        assert watching.pid is not None
        os.kill(watching.pid, signal.SIGINT)
        watching.join(20)
        assert left.value == 130
        assert running.is_alive()
    assert run_state(folder) == "completed"
    assert len([line for line in read_json_lines(folder / "metrics.jsonl") if line["event"] == "aggregated"]) == ROUNDS


def test_a_superlink_that_does_not_answer_is_not_waited_for_without_end(study: StudyFolder, folder: Path) -> None:
    said = io.StringIO()

    def unknown(study: StudyFolder) -> dict[str, Any]:
        found = _status(study)
        return found | {"run": found["run"] | {"state": "unknown"}}

    watch(study, Console(file=said, width=110), False, unknown, unreachable_s=1.0, ask_every_s=0.2)
    assert "the SuperLink does not answer. The run may go on." in " ".join(said.getvalue().split())


def test_a_run_that_no_process_works_on_is_not_watched(study: StudyFolder, folder: Path) -> None:
    RunFolder(folder).set_status("running", run="r")
    code, output = call("status", "--study", study.folder, "--watch")
    assert code == 0
    assert "cut short. `semisam lead start`, then `semisam lead run --resume` continues it." in output


def test_a_study_without_a_run_has_nothing_to_watch(study: StudyFolder) -> None:
    assert call("status", "--study", study.folder, "--watch")[1].endswith("No run has been started.")


def test_json_is_for_scripts_and_cannot_be_watched(study: StudyFolder, folder: Path) -> None:
    code, output = call("status", "--study", study.folder, "--watch", "--json")
    assert code == 2
    assert "use --json alone" in output
    RunFolder(folder).record(
        "joined", round=0, site="north", counts="buckets", **COUNTS | {"unlabeled": 5, "validation": 1}
    )
    code, output = call("status", "--study", study.folder, "--json")
    assert json.loads(output)["run"]["events"] == [
        "north joined: 1-4 labeled, 5-9 unlabeled, 1-4 validation, 0 quarantined"
    ]


def _of(running: bool, **connections: str) -> dict[str, Any]:
    sites = [{"site": site, "connection": each} for site, each in connections.items()]
    return {"superlink": {"running": running}, "sites": sites}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (_of(True, north="online"), _of(True, north="online"), []),
        (_of(True, north="online"), _of(True, north="offline"), ["north is offline, was online"]),
        (_of(True), _of(True, east="online"), ["east is online, was not registered"]),
        (_of(True), _of(False), ["the SuperLink has ended"]),
        (_of(False), _of(True), ["the SuperLink is running"]),
    ],
)
def test_a_change_of_connections_is_one_line(before: Any, now: Any, said: list[str]) -> None:
    assert list(changes(before, now)) == said
