"""The run's record: whole rounds only, lines that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.run_folder import RunFolder


def _weights(plan: Plan) -> dict[str, torch.Tensor]:
    return dict(new_specialist(plan).state_dict())


def test_rounds_come_back_as_they_were(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_round() is None
    for number in (0, 1, 2):
        folder.save_round(number, _weights(plan), plan)
    assert RunFolder(tmp_path).last_round() == 2
    loaded = folder.load_round(2, plan)
    assert all(torch.equal(loaded[name], value) for name, value in _weights(plan).items())


def test_other_files_are_no_rounds(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    folder.save_round(1, _weights(plan), plan)
    for name in ("round-x.safetensors", ".round-00002.safetensors.tmp", "notes.txt"):
        (tmp_path / "checkpoints" / name).touch()
    assert folder.last_round() == 1


def test_the_published_specialist_says_its_round_and_how_it_was_chosen(tmp_path: Path, plan: Plan) -> None:
    from safetensors import safe_open

    RunFolder(tmp_path).save_best(4, _weights(plan), plan, "last round")
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "last round" in metadata.values()
    assert plan.hash in metadata.values()
    assert "4" in metadata.values()


def test_records_survive_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.record("joined", site="a")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "jo')
    folder.record("joined", site="b")
    assert [line["site"] for line in folder.records("joined")] == ["a", "b"]


@pytest.mark.parametrize("state", ["running", "completed", "failed"])
def test_the_status_says_how_the_run_stands(tmp_path: Path, state: str) -> None:
    RunFolder(tmp_path).set_status(state, "a reason", run="run-1")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"], status["run"]) == (state, "a reason", "run-1")
