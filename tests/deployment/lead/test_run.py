"""Runs: never two processes for one run folder, and the truth about how each ended."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import psutil
import pytest
from rich.console import Console

import deployment.lead.run as run_module
from deployment.lead.run import LeadRun, RunRecord, new_run, resumed_run
from deployment.lead.study_folder import LeadError, StudyFolder
from engines.flower_control import FlowerControl, FlowerRun
from engines.processes import birth
from engines.run_state import run_state
from semisam_core.files import write_atomically, write_json


class SlowControl:
    """A control API that lists a submitted run only after a moment."""

    def __init__(self) -> None:
        self.runs: list[FlowerRun] = []
        self.asked, self.go_on = threading.Event(), threading.Event()

    def unfinished_runs(self) -> list[FlowerRun]:
        return list(self.runs)

    def submit(self, bundle: bytes, config: Mapping[str, object]) -> int:
        self.asked.set()
        assert self.go_on.wait(20)
        self.runs.append(FlowerRun(len(self.runs) + 1, "running", "", "", dict(config)))
        return len(self.runs)


@pytest.fixture
def serving_already(study: StudyFolder) -> StudyFolder:
    """Return a study whose SuperLink appears to be running."""
    process = psutil.Process(os.getpid())
    record = {"pid": process.pid, "birth": birth(process), "mark": "a mark that no process carries"}
    write_json(study.server / "superlink.json", record)
    return study


def _interrupted(study: StudyFolder) -> Path:
    folder = study.runs / "a-run"
    folder.mkdir()
    write_atomically(folder / "plan.yaml", study.plan_path.read_bytes())
    RunRecord(created=1.0, sites=2, code_hash="0" * 64).write(folder)
    return folder


def _resume(study: StudyFolder, control: FlowerControl) -> LeadRun:
    return resumed_run(study, control, None, Console(quiet=True))


def _new(study: StudyFolder, control: FlowerControl) -> LeadRun:
    return new_run(study, control, None)


@pytest.mark.parametrize("second", [_resume, _new])
def test_while_one_command_submits_a_run_another_submits_none(
    serving_already: StudyFolder, second: Callable[[StudyFolder, FlowerControl], LeadRun]
) -> None:
    folder, slow = _interrupted(serving_already), SlowControl()
    control, submitted = cast(FlowerControl, slow), list[LeadRun]()
    first = threading.Thread(target=lambda: submitted.append(_resume(serving_already, control)))
    first.start()
    try:
        assert slow.asked.wait(20)
        threading.Timer(2.0, slow.go_on.set).start()  # a second command that gets through must not hang
        with pytest.raises(LeadError, match=r"another .* is submitting a run"):
            second(serving_already, control)
    finally:
        slow.go_on.set()
        first.join(20)
    assert [run.folder for run in submitted] == [folder]
    assert len(slow.runs) == 1
    assert _resume(serving_already, control).run_id == 1  # once listed, it is followed


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_to_be_logged_to_mlflow_says_so_in_its_folder(
    serving_already: StudyFolder, tmp_path: Path, resume: bool
) -> None:
    slow = SlowControl()
    slow.go_on.set()
    control = cast(FlowerControl, slow)
    if resume:
        _interrupted(serving_already)
        run = resumed_run(serving_already, control, None, Console(quiet=True), tmp_path / "store")
    else:
        run = new_run(serving_already, control, None, tmp_path / "store")
    asked = json.loads((run.folder / "mlflow.json").read_text())
    assert asked["folder"] == str(tmp_path / "store")
    assert asked["study"] == serving_already.settings.name
    assert asked["code_hash"] == RunRecord.of(run.folder).code_hash
    with pytest.raises(LeadError, match="this one is in progress; omit it to follow"):
        resumed_run(serving_already, control, None, Console(quiet=True), tmp_path / "store")


class EndedControl:
    """A control API that reports how a run ended."""

    def __init__(self, end: str) -> None:
        self._end = end

    def run(self, run_id: int) -> FlowerRun:
        return FlowerRun(run_id, "finished", self._end, "", {})


@pytest.mark.parametrize(
    ("flower", "own", "completed"),
    [
        ("completed", "completed", True),
        ("completed", "failed", False),
        ("completed", "running", False),
        ("failed", "completed", False),
        ("stopped", "running", False),
        ("", "completed", False),
    ],
)
def test_a_run_completed_only_if_both_flower_and_the_run_say_so(
    serving_already: StudyFolder, monkeypatch: pytest.MonkeyPatch, flower: str, own: str, completed: bool
) -> None:
    monkeypatch.setattr(run_module, "ASK_EVERY_S", 0.0)
    folder = _interrupted(serving_already)
    write_json(folder / "status.json", {"state": own, "reason": "as the run says"})
    run = LeadRun(serving_already, folder, 1, serving_already.plan())
    assert run.follow(cast(FlowerControl, EndedControl(flower)), Console(quiet=True)) is completed
    assert (run_state(folder) == "completed") is completed
