"""Tensors that live on disk: what they hold, the memory they take, and what happens when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from semisam_core.scratch import Scratch

MB = 2**20


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16, torch.bool])
def test_a_tensor_is_zero_until_it_is_written_and_keeps_its_values(tmp_path: Path, dtype: torch.dtype) -> None:
    scratch = Scratch(tmp_path / "new")
    tensor, other = scratch.zeros((3, 5, 7), dtype), scratch.zeros((3, 5, 7), dtype)
    assert not bool(tensor.any())
    tensor[1] = 1
    scratch.release()
    assert float(tensor.float().sum()) == 35
    assert not bool(other.any())
    kept = scratch.keep(tensor)
    tensor.zero_()
    assert float(kept.float().sum()) == 35


def test_what_is_released_takes_no_memory(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    before = _resident_mb()
    tensors = [scratch.zeros((40, MB // 4)) for _ in range(2)]
    for each in tensors:
        for k, row in enumerate(each):
            row.fill_(k)
            scratch.release()
            assert _resident_mb() - before < 20
    assert [float(row.sum()) for row in tensors[1]] == [float(k * (MB // 4)) for k in range(40)]
    assert _resident_mb() - before > 30  # reading takes it again
    scratch.release()
    assert _resident_mb() - before < 20


def test_nothing_is_left_in_the_folder_and_files_go_with_their_tensors(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    tensor = scratch.zeros((10, 10))
    part = tensor[3]
    assert list(tmp_path.iterdir()) == []
    del tensor
    part += 1
    assert float(part.sum()) == 10
    del part
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Scratch(tmp_path).zeros((4, 4))


def test_without_a_folder_tensors_are_in_memory() -> None:
    scratch = Scratch()
    tensor = scratch.zeros((2, 3))
    tensor += 1
    scratch.release()
    assert torch.equal(tensor, torch.ones(2, 3))
    assert scratch.zeros((0, 3)).shape == (0, 3)
