"""Room for the maps of all classes of one scan, of which only those that are worked on take memory."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Scratch:
    """Makes tensors that live on disk and in memory only while they are used.

    A tensor is the mapping of a file that has no name: it is gone with the tensor, however the process ends. What is
    read or written takes memory until `release`; the content stays, in the file. So work that goes through the classes
    of a scan one by one and releases after each takes the memory of one class. Where the system cannot be told (not on
    Linux), it decides on its own what to take back.

    Args:
        folder: where the files are, created on first use; None for ordinary tensors in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of zeros.

        Raises:
            OSError: the disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        if self._folder is None or size == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process at a write
            else:
                file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        self._mapped.add(memory)
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor.

        Raises:
            OSError: the disk is full.
        """
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)

    def release(self) -> None:
        """Give back the memory of all tensors; they keep their values."""
        if sys.platform == "linux":
            for memory in self._mapped:
                memory.madvise(mmap.MADV_DONTNEED)
