"""The run folder: only intact rounds count, and lines survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semisam_core.errors import ConfigError
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.run_folder import RunFolder
from tests.conftest import tiny_plan


def _weights(plan: Plan) -> dict[str, torch.Tensor]:
    return dict(new_specialist(plan).state_dict())


def test_rounds_are_read_back_unchanged(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_round() is None
    for number in (0, 1, 2):
        folder.save_round(number, _weights(plan), plan)
    assert RunFolder(tmp_path).last_round() == 2
    loaded = folder.load_round(2, plan)
    assert all(torch.equal(loaded[name], value) for name, value in _weights(plan).items())


def test_other_files_are_not_mistaken_for_rounds(tmp_path: Path, plan: Plan) -> None:
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
def test_the_status_has_state_reason_and_run(tmp_path: Path, state: str) -> None:
    RunFolder(tmp_path).set_status(state, "a reason", run="run-1")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"], status["run"]) == (state, "a reason", "run-1")


def _tear(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-3] ^= 1  # one bit of a tensor: the file format is still valid
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "bit"])
def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_it_is_used(tmp_path: Path, plan: Plan, how: str) -> None:
    folder = RunFolder(tmp_path)
    for number in (0, 1, 2):
        folder.save_round(number, _weights(plan), plan, {"round": number})
    _tear(tmp_path / "checkpoints" / "round-00002.safetensors", how)
    with pytest.raises(ConfigError, match="round-00002"):
        folder.load_round(2, plan)
    newest = folder.newest(plan)
    assert newest is not None
    assert (newest.round, newest.record) == (1, {"round": 1})
    (event,) = folder.records("set-aside")
    assert event["checkpoint"] == 2
    assert (tmp_path / "checkpoints" / event["file"]).exists()
    assert folder.last_round() == 1


def test_a_checkpoint_of_another_plan_is_not_resumed(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    folder.save_round(1, _weights(plan), plan)
    folder.save_round(2, _weights(plan), tiny_plan("seed=1"))
    with pytest.raises(ConfigError, match="another plan's hash"):
        folder.load_round(2, plan)
    newest = folder.newest(plan)
    assert newest is not None
    assert newest.round == 1


def test_a_checkpoint_with_corrupt_optimizer_state_is_not_used_either(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.save_round(number, _weights(plan), plan, moments={"first.w": torch.ones(3, dtype=torch.float64)})
    _tear(tmp_path / "checkpoints" / "optimizer-00002.safetensors", "bit")
    newest = folder.newest(plan)
    assert newest is not None
    assert newest.round == 1
    assert newest.moments["first.w"].tolist() == [1, 1, 1]


def test_without_an_intact_checkpoint_there_is_none(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    folder.save_round(0, _weights(plan), plan)
    _tear(tmp_path / "checkpoints" / "round-00000.safetensors", "cut")
    assert folder.newest(plan) is None


def test_only_the_last_states_of_an_optimizer_are_kept(tmp_path: Path, plan: Plan) -> None:
    folder = RunFolder(tmp_path)
    for number in range(1, 7):
        folder.save_round(number, _weights(plan), plan, moments={"first.w": torch.ones(1, dtype=torch.float64)})
    assert len(list((tmp_path / "checkpoints").glob("optimizer-*"))) == 3
