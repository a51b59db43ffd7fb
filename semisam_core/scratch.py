"""Room for the maps of all classes of one scan, of which only those that are worked on take memory."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 1 << 18  # numbers of a map that are worked on at once
_MAPS = 8  # of more maps, less at once
_GROUP = 64  # a multiple of the numbers that any CPU computes at once


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
        kept = self.zeros(tensor.shape, tensor.dtype)
        self.copy(kept, tensor.contiguous())
        return kept

    def copy(self, place: Tensor, tensor: Tensor) -> None:
        """Copy a tensor to another's place; both as for `blocks`."""
        for to, each in self.blocks(place, tensor):
            to.copy_(each)

    def above(self, tensor: Tensor, threshold: float) -> Tensor:
        """Return where a tensor exceeds a threshold, in memory."""
        found = torch.empty(tensor.shape, dtype=torch.bool)
        for to, each in self.blocks(found, tensor):
            torch.gt(each, threshold, out=to)
        return found

    def any_above(self, tensor: Tensor, threshold: float) -> bool:
        """Return whether a tensor exceeds a threshold anywhere."""
        found = any(bool((each > threshold).any()) for (each,) in self.blocks(tensor))
        self.release()
        return found

    def blocks(self, *maps: Tensor) -> Iterator[list[Tensor]]:
        """Go through maps block by block, and give back the memory of all tensors after each.

        What is computed of single voxels is the same as of whole maps, bit by bit: torch computes several numbers at
        once and those that remain at an array's end one by one, which may round differently, and only the last block
        has such an end.

        Args:
            maps: contiguous, all of one number of voxels; in this scratch or in memory.

        Yields:
            The same block of each map, flat.
        """
        flat = [each.view(-1) for each in maps]
        size = max(1, BLOCK * _MAPS // max(len(maps), _MAPS) // _GROUP) * _GROUP
        for start in range(0, len(flat[0]), size):
            yield [each[start : start + size] for each in flat]
            self.release()

    def release(self) -> None:
        """Give back the memory of all tensors; they keep their values."""
        if sys.platform == "linux":
            for memory in self._mapped:
                memory.madvise(mmap.MADV_DONTNEED)
