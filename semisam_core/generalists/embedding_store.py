"""A cache of embeddings on the site's disk, so that scans are encoded once; survives kills and full disks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from semisam_core.files import write_atomically
from semisam_core.generalists.base import Generalist, VolumeGrid
from semisam_core.progress import ProgressCallback

logger = logging.getLogger(__name__)


_SUFFIX = ".safetensors"
_FORMAT = "2"
_ABANDONED_SECONDS = 3600  # a temporary file of this age was left by a process that was killed


def scan_key(volume: Tensor) -> str:
    """Return the SHA-256 of a scan's shape, data type and voxels, in hexadecimal."""
    digest = hashlib.sha256(json.dumps([list(volume.shape), str(volume.dtype)]).encode())
    digest.update(_bytes_of(volume))
    return digest.hexdigest()


class EmbeddingStore:
    """A bounded cache of embeddings, one file each, in half precision.

    Losing a file costs only time. A damaged file is deleted and counts as absent, the least recently used files are
    evicted first, and a failed write is reported once and otherwise ignored. Several processes may share the folder.

    Attributes:
        hits: embeddings that were read.
        misses: embeddings that had to be computed.
        write_failures: embeddings that could not be written.
    """

    def __init__(self, folder: Path, limit_bytes: int, chunk: int = 4) -> None:
        """Use a folder, created on the first write.

        Args:
            folder: used for nothing else.
            limit_bytes: disk space for all files; 0 keeps nothing.
            chunk: units encoded between writes, which is the most that a kill can lose.
        """
        if limit_bytes < 0 or chunk < 1:
            raise ValueError(f"limit_bytes must be at least 0 and chunk at least 1, not {limit_bytes}, {chunk}")
        self.hits = 0
        self.misses = 0
        self.write_failures = 0
        self._folder = folder
        self._limit = limit_bytes
        self._chunk = chunk

    def fetch(
        self,
        generalist: Generalist,
        scan_key: str,
        volume: Tensor,
        grid: VolumeGrid,
        units: Sequence[int],
        progress: ProgressCallback | None = None,
    ) -> dict[int, Tensor]:
        """Return the embeddings of a scan's units; only those not yet stored are encoded.

        Values are rounded to half precision whether an embedding was stored or has just been computed.

        Args:
            generalist: the model that encodes.
            scan_key: `scan_key(volume)`.
            volume: the scan (H, W, D).
            grid: its voxels.
            units: embedding units, as from `generalist.units`.
            progress: called with (units ready, units needed), at the start and after each chunk.

        Returns:
            unit -> embedding, float32.
        """
        names = {unit: entry_name(generalist, scan_key, grid, unit) for unit in units}
        found: dict[int, Tensor] = {}
        for unit, name in names.items():
            if (embedding := self._read(name)) is not None:
                found[unit] = embedding
        absent = [unit for unit in names if unit not in found]
        self.hits += len(found)
        self.misses += len(absent)
        if progress:
            progress(len(found), len(names))
        for start in range(0, len(absent), self._chunk):
            made = generalist.embed(volume, grid, absent[start : start + self._chunk])
            halves = {unit: embedding.half() for unit, embedding in made.items()}
            keepable = {names[unit]: half for unit, half in halves.items() if torch.isfinite(half).all()}
            self._keep(keepable)
            for unit, half in halves.items():
                found[unit] = half.float() if names[unit] in keepable else made[unit].float()
            if progress:
                progress(len(found), len(names))
        if absent:
            self._make_room(0)  # another process may have written meanwhile
        return {unit: found[unit] for unit in names}

    def _read(self, name: str) -> Tensor | None:
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                half = file.get_tensor("embedding")
            if half.dtype != torch.float16 or metadata.get("checksum") != _checksum(name, half):
                raise ValueError("the file was altered")
            embedding: Tensor = half.float()
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # marks the file as recently used
        return embedding

    def _keep(self, halves: Mapping[str, Tensor]) -> None:
        content = {name: _serialised(name, half) for name, half in halves.items()}
        content = {name: each for name, each in content.items() if len(each) <= self._limit}
        for name, each in content.items():
            try:
                self._make_room(len(each))
                write_atomically(self._folder / f"{name}{_SUFFIX}", each)
            except OSError as error:
                self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        self.write_failures += 1
        if self.write_failures == 1:
            logger.warning(
                "An embedding could not be written to disk (%s). Work continues, but such embeddings are computed "
                "again each time. Free disk space, or lower the site's limit for embeddings.",
                error.strerror or type(error).__name__,
            )

    def _make_room(self, incoming: int) -> None:
        files = list(_files(self._folder))
        excess = sum(file.size for file in files) + incoming - self._limit
        now = time.time()
        for file in sorted(files, key=lambda file: (file.used_ns, file.path.name)):
            abandoned = file.temporary and now - file.used_ns / 1e9 > _ABANDONED_SECONDS
            if abandoned or (excess > 0 and not file.temporary):
                with contextlib.suppress(OSError):
                    file.path.unlink()
                    excess -= file.size


def entry_name(generalist: Generalist, scan_key: str, grid: VolumeGrid, unit: int) -> str:
    """Return the name of an embedding: unique to scan, voxel size, model, weights, preprocessing and unit."""
    card = generalist.card
    spacing = [round(side, 4) for side in grid.spacing_mm]
    parts = [_FORMAT, scan_key, spacing, card.name, generalist.weights_sha256, card.preprocessing, unit]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used_ns: int
    temporary: bool


def _files(folder: Path) -> Iterable[_File]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # missing or unreadable: nothing to count or evict
        return
    for entry in entries:
        temporary = entry.name.startswith(".") and _SUFFIX in entry.name
        if not temporary and not entry.name.endswith(_SUFFIX):
            continue
        with contextlib.suppress(OSError):  # another process removed it
            status = entry.stat(follow_symlinks=False)
            yield _File(Path(entry.path), status.st_size, status.st_mtime_ns, temporary)


def _serialised(name: str, half: Tensor) -> bytes:
    contiguous = half.cpu().contiguous()
    return save({"embedding": contiguous}, {"checksum": _checksum(name, contiguous)})


def _checksum(name: str, half: Tensor) -> str:
    """Return a checksum that binds an embedding's values and shape to its name."""
    digest = hashlib.sha256(json.dumps([name, list(half.shape), str(half.dtype)]).encode())
    digest.update(_bytes_of(half))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
