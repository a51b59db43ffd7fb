"""Paths that cannot be used are refused in one sentence; the operating system's own errors, nothing simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from semisam_core.errors import ConfigError
from semisam_core.paths import absolute_path, writable_folder


def test_home_folders_links_and_bases_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert absolute_path(Path("~/scans"), "--images") == tmp_path / "scans"
    assert absolute_path(Path("link/scans"), "data.images", tmp_path) == tmp_path / "real" / "scans"
    monkeypatch.chdir(tmp_path)
    assert absolute_path(Path("scans"), "--images") == tmp_path / "scans"


def test_a_path_below_a_file_is_left_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert absolute_path(tmp_path / "file" / "below", "--images") == tmp_path / "file" / "below"


def test_a_user_without_a_home_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--out ~nobody-here/runs: .*no home folder for ~nobody-here"):
        absolute_path(Path("~nobody-here/runs"), "--out")


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"--out .*/loop/runs: this path cannot be used"):
        absolute_path(tmp_path / "loop" / "runs", "--out")


def test_a_name_that_is_too_long_is_refused_and_shortened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long") as caught:
        absolute_path(tmp_path / ("x" * 5000), "--out")
    assert len(str(caught.value)) < 300


def test_a_null_character_is_refused() -> None:
    with pytest.raises(ConfigError, match="null character"):
        absolute_path(Path("a\0b"), "data.images")


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "new" / "folder", "--out") == tmp_path / "new" / "folder"
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize("name", ["below-a-file", "of-the-kernel"])
def test_a_folder_that_cannot_be_written_to_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = (
        tmp_path / "file" / "runs" if name == "below-a-file" else Path("/proc/runs")
    )  # root cannot write there either
    with pytest.raises(ConfigError, match=r"--out .*/runs: this folder cannot be written to \("):
        writable_folder(folder, "--out")
