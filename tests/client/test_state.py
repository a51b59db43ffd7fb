"""A site's state on disk: which round's tensors are kept and found, and a progress log that never stops work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.progress import ProgressLog
from client.state import RunState
from semisam_core.files import read_json_lines


@settings(deadline=None, max_examples=50)
@given(name=st.text(max_size=70).filter(lambda text: not text.isascii() or not text.replace("-", "").isalnum()))
def test_no_invalid_run_name_leads_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("storage")
    with pytest.raises(ValueError, match="run's name"):
        RunState(folder, name)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc", "-a", "A", "x" * 64, "a\n"])
def test_run_names_that_would_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run's name"):
        RunState(tmp_path, name)


def _teacher(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def _value(teacher: dict[str, torch.Tensor] | None) -> float | None:
    return None if teacher is None else float(teacher["w"][0])


def test_teachers_of_the_sites_last_three_rounds_are_kept(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (1, 2, 4, 7, 8):
        state.save_teacher(number, _teacher(number))
    assert sorted(path.name for path in state.folder.iterdir()) == [f"teacher-0000{k}.safetensors" for k in (4, 7, 8)]


def test_the_teacher_is_the_latest_of_a_round_before_this_one(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (2, 3, 6):
        state.save_teacher(number, _teacher(number))
    found = {before: _value(state.load_teacher(before)) for before in (1, 2, 3, 4, 5, 6, 7, 99)}
    assert found == {1: None, 2: None, 3: 2, 4: 3, 5: 3, 6: 3, 7: 6, 99: 6}


def test_saving_an_earlier_round_again_keeps_those_after_it(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (1, 2, 3, 4):
        state.save_teacher(number, _teacher(number))
    state.save_teacher(3, _teacher(30))
    assert [_value(state.load_teacher(before)) for before in (3, 4, 5)] == [2, 30, 4]


def test_a_run_that_restarts_keeps_its_new_teachers_beside_later_ones(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (6, 7, 8, 1, 2):
        state.save_teacher(number, _teacher(number))
    assert [_value(state.load_teacher(before)) for before in (2, 3, 9)] == [1, 2, 8]


def test_a_damaged_teacher_is_named_in_the_log_and_an_earlier_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = RunState(tmp_path, "run")
    for number in (1, 2):
        state.save_teacher(number, _teacher(number))
    (state.folder / "teacher-00002.safetensors").write_bytes(b"torn")
    assert _value(state.load_teacher(3)) == 1
    assert "teacher-00002.safetensors cannot be read and is ignored" in caplog.text


def test_progress_always_reports_first_and_last(tmp_path: Path) -> None:
    progress = ProgressLog(tmp_path / "progress.jsonl", 2)
    for done in range(1001):
        progress("train", done, 1000, "steps")
    lines = read_json_lines(tmp_path / "progress.jsonl")
    assert (lines[0]["done"], lines[-1]["done"]) == (0, 1000)
    assert len(lines) < 100
    assert {line["round"] for line in lines} == {2}


def test_a_failed_progress_write_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").mkdir()
    ProgressLog(tmp_path / "progress.jsonl", 1)("train", 0, 10, "steps")
