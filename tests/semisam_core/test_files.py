"""Atomic files, and logs that survive a torn last line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from semisam_core.files import TensorParts, append_json_line, read_json_lines, save_tensor_parts, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_modes_respect_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "file", b"a scan")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_line_appended_after_a_torn_one_is_intact(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'{"n": 2, "torn')
    append_json_line(path, {"n": 3})
    assert [line["n"] for line in read_json_lines(path)] == [1, 3]


def test_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "absent.jsonl") == []


@settings(deadline=None, max_examples=25)
@given(lines=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8)), max_size=5))
def test_lines_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    for line in lines:
        append_json_line(path, line)
    assert read_json_lines(path) == lines


TENSORS = st.lists(
    st.tuples(
        st.sampled_from([torch.float16, torch.int32, torch.int64, torch.bool]),
        st.lists(st.integers(0, 4), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=30)
@given(described=TENSORS, seed=st.integers(0, 99))
def test_tensors_written_in_parts_are_read_by_the_library(
    described: list[tuple[torch.dtype, list[int]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, generator = tmp_path_factory.mktemp("parts") / "file.safetensors", torch.Generator().manual_seed(seed)
    wanted = {
        f"tensor {n}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for n, (dtype, shape) in enumerate(described)
    }
    parts = {name: TensorParts(each.dtype, each.shape, each.unbind) for name, each in wanted.items()}
    save_tensor_parts(path, parts, {"about": '{"a": "ü"}'})
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert found[name].dtype is each.dtype
        assert torch.equal(found[name], each)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"about": '{"a": "ü"}'}


@pytest.mark.parametrize("made", [torch.zeros(2, 3).half(), torch.zeros(4, 3).half(), torch.zeros(3, 3)])
def test_parts_that_are_not_as_said_leave_no_file(tmp_path: Path, made: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the tensor y are not of its type and shape"):
        save_tensor_parts(tmp_path / "file", {"y": TensorParts(torch.float16, (3, 3), made.unbind)}, {})
    assert list(tmp_path.iterdir()) == []
