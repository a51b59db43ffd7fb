"""A site's own state: teachers by round, progress that never stops work."""

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
def test_a_runs_name_cannot_lead_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("storage")
    with pytest.raises(ValueError, match="run's name"):
        RunState(folder, name)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/etc", "-a", "A", "x" * 64, "a\n"])
def test_names_that_would_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run's name"):
        RunState(tmp_path, name)


def test_the_teachers_of_the_last_three_rounds_are_kept(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in range(1, 6):
        state.save_teacher(number, {"w": torch.full((2,), float(number))})
    left = {number: state.load_teacher(before=number + 1) for number in range(1, 6)}
    assert left[1] is None
    assert left[2] is None
    for number in (3, 4, 5):
        teacher = left[number]
        assert teacher is not None
        assert teacher["w"].tolist() == [number, number]


def test_a_site_that_missed_rounds_goes_on_from_the_last_teacher_it_kept(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    state.save_teacher(2, {"w": torch.full((2,), 2.0)})
    for number in (3, 4, 7):
        teacher = state.load_teacher(before=number)
        assert teacher is not None
        assert teacher["w"].tolist() == [2, 2]
    assert state.load_teacher(before=2) is None


def test_a_damaged_teacher_counts_as_absent(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    state.save_teacher(1, {"w": torch.ones(2)})
    (file,) = state.folder.glob("teacher-*")
    file.write_bytes(b"torn")
    assert state.load_teacher(before=2) is None


def test_progress_always_says_the_first_and_the_last(tmp_path: Path) -> None:
    progress = ProgressLog(tmp_path / "progress.jsonl", 2)
    for done in range(1001):
        progress("train", done, 1000, "steps")
    lines = read_json_lines(tmp_path / "progress.jsonl")
    assert (lines[0]["done"], lines[-1]["done"]) == (0, 1000)
    assert len(lines) < 100
    assert {line["round"] for line in lines} == {2}


def test_progress_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").mkdir()
    ProgressLog(tmp_path / "progress.jsonl", 1)("train", 0, 10, "steps")
