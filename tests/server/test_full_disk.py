"""A server whose disk is full says so, corrupts nothing, and resumes once there is space again."""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flwr.app import Context, Message, MessageType, RecordDict

from semisam_core.contract import weights_sha256
from semisam_core.plan import Plan
from server.app import app as server_app
from server.run_folder import RecordNotKeptError, RunFolder
from tests.conftest import tiny_plan
from tests.server.scripted import Script, ScriptedGrid, Time, answer_well, run, weights_of

DISK_BYTES = 2_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _plan() -> Plan:
    rounds = ("training.rounds=3", "evaluation.every_rounds=1", "aggregation.minimum_sites=2")
    return tiny_plan(*rounds, "specialist.arguments.channels=[8, 16]")


def _serve(grid: ScriptedGrid, plan: Plan, folder: Path) -> None:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int | float | bool] = {"plan": str(path), "num-sites": 2, "run-folder": str(folder)}
    server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))


def _filling(disk: Path, room: int) -> Script:
    """Return a good site; before it replies, something else fills the server's disk, leaving `room` bytes."""

    def script(grid: ScriptedGrid, sent: Message) -> Message:
        with (disk / "something-else").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                file.truncate(file.tell() - room)
        return answer_well(grid, sent)

    return script


def _grid() -> ScriptedGrid:
    return ScriptedGrid(Time(), "alpha", "beta")


@pytest.mark.parametrize("updates", [0, 0.5, 1.2, 2.3, 3.3])
def test_a_full_disk_ends_the_run_with_a_message_and_the_run_resumes_once_there_is_space(
    small_disk: Path, tmp_path: Path, updates: float
) -> None:
    whole = run(_grid(), _plan(), tmp_path / "whole", 2)
    room = int(updates * (whole.path / "best.safetensors").stat().st_size)
    grid = _grid()
    grid.scripts["alpha", MessageType.TRAIN, 2] = [_filling(small_disk, room)]
    with pytest.raises(RecordNotKeptError, match="could not be written: the disk is full"):
        _serve(grid, _plan(), small_disk / "run")
    status = json.loads((small_disk / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "the disk is full. All finished rounds are kept; free some space, then resume." in status["reason"]
    assert not list(small_disk.glob("run/**/.*.tmp*"))
    (small_disk / "something-else").unlink()
    _serve(_grid(), _plan(), small_disk / "run")
    record = RunFolder(small_disk / "run")
    assert json.loads((small_disk / "run" / "status.json").read_text())["state"] == "completed"
    for number in range(4):
        expected = weights_sha256(weights_of(whole, number, _plan()))
        assert weights_sha256(weights_of(record, number, _plan())) == expected
    assert [line["round"] for line in record.records("aggregated")] == [1, 2, 3]
    assert record.records("set-aside") == []


def _serve_with_small_files(folder: Path) -> None:
    def limited(grid: ScriptedGrid, sent: Message) -> Message:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return answer_well(grid, sent)

    grid = _grid()
    grid.scripts["beta", MessageType.TRAIN, 2] = [limited]
    _serve(grid, _plan(), folder)


def test_a_file_size_limit_ends_the_run_in_the_same_way(tmp_path: Path) -> None:
    """Like a full disk, but without mounting one: the kernel itself refuses to write."""
    folder = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=_serve_with_small_files, args=(folder,))
    process.start()
    process.join(timeout=60)
    try:
        assert process.exitcode == 1
    finally:
        process.kill()
        process.join()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert "the file is too large" in status["reason"]
    whole = run(_grid(), _plan(), tmp_path / "whole", 2)
    _serve(_grid(), _plan(), folder)
    expected = weights_sha256(weights_of(whole, 3, _plan()))
    assert weights_sha256(weights_of(RunFolder(folder), 3, _plan())) == expected
