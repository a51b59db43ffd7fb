"""Atomic files, and logs that survive a torn last line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.files import append_json_line, read_json_lines, write_atomically


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
