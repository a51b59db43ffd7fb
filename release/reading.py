"""Read scans in a child process, so that a file which crashes its decoder or eats memory costs its own scan only.

Voxels come back as plain numbers in an anonymous file in memory: they touch no disk, and are gone with the processes.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from intake.conversion import hand_over
from intake.guards import LIMITS, Entry, Limits, Worker, check_affine, check_shape
from intake.volume import IntakeError
from release.inputs import Input
from semisam_core.configuration import StrictModel
from semisam_core.data.geometry import Geometry

Row = tuple[float, float, float, float]


class _Answer(StrictModel):
    """Where the voxels that were written lie."""

    shape: tuple[int, int, int]
    affine: tuple[Row, Row, Row, Row]
    notes: tuple[str, ...]


class ScanReader(AbstractContextManager["ScanReader"]):
    """Reads one scan after another in a child process.

    Args:
        spacing_mm: voxel size, for h5 files.
        memory_gb: memory that a scan may take, all channels: bounds its voxels, judged by the header, and the child.
            None for the readers' own limits.
        limits: the readers' own limits.
        entry: what the child calls.
    """

    def __init__(
        self,
        spacing_mm: tuple[float, float, float] | None = None,
        memory_gb: float | None = None,
        limits: Limits = LIMITS,
        entry: Entry | None = None,
    ) -> None:
        if memory_gb is not None:
            most = int(memory_gb * 1e9)
            limits = replace(limits, voxels=min(limits.voxels, most // 4), memory_bytes=min(limits.memory_bytes, most))
        self._spacing_mm, self._limits = spacing_mm, limits
        self._worker = Worker(entry or hand_over, limits)

    def read(self, scan: Input) -> tuple[NDArray[np.float32], Geometry, list[str]]:
        """Return the channels (C, X, Y, Z), where they lie, and notes.

        Raises:
            IntakeError: a file cannot be read, is too large, or ended the process that read it.
        """
        first, channels = Path(scan.candidate.channels[0].paths[0]), len(scan.candidate.channels)
        with os.fdopen(os.memfd_create("voxels"), "rb") as file:
            request = {
                "channels": [each.model_dump(mode="json") for each in scan.candidate.channels],
                "spacing_mm": self._spacing_mm,
                "voxels": self._limits.voxels // channels,
                "into": f"/proc/{os.getpid()}/fd/{file.fileno()}",
            }
            answer = self._worker.call(request)
            try:
                told = _Answer.model_validate(answer, strict=False)
            except ValidationError:
                raise IntakeError(f"{first.name!a}: the process that read it gave no usable answer.") from None
            shape = (channels, *told.shape)
            check_shape(first, shape, self._limits)
            affine = np.array(told.affine, dtype=np.float64)
            check_affine(first, affine)
            if os.fstat(file.fileno()).st_size != 4 * math.prod(shape):
                raise IntakeError(f"{first.name!a}: the process that read it gave other voxels than it said.")
            voxels = np.fromfile(file, dtype=np.float32).reshape(shape)
        return voxels, Geometry(told.shape, torch.from_numpy(affine)), list(told.notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close()
