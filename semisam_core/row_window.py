"""A volume of which only some rows take memory, for work that moves through a large scan row by row."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE; Python's mmap module has no name for it


class RowWindow:
    """A (C, H, W, D) float32 volume of zeros; rows take memory once they are written, and until they are released.

    It is a tensor of the whole shape, so that functions that need one (grid_sample) compute as they do with all rows in
    memory. Rows are pages of an anonymous mapping: the system gives a page when it is first written and takes it back
    when it is told to. Where it cannot be told (not on Linux), released rows keep their memory.

    Args:
        channels: C.
        shape: (H, W, D).
    """

    def __init__(self, channels: int, shape: tuple[int, int, int]) -> None:
        height, width, depth = shape
        self._row_bytes = channels * width * depth * 4
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._memory = mmap.mmap(-1, height * self._row_bytes, flags=flags)
        rows = torch.frombuffer(self._memory, dtype=torch.float32).view(height, channels, width, depth)
        self.volume: Tensor = rows.transpose(0, 1)
        self._released = 0

    def page_out(self) -> None:
        """Do nothing: there is no file that could keep the rows."""

    def release(self, before: int) -> None:
        """Give back the memory of all rows before this one; they must not be used again."""
        end = before * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if end > self._released and sys.platform == "linux":
            self._memory.madvise(mmap.MADV_DONTNEED, self._released, end - self._released)
            self._released = end
