"""A cache of embeddings on the site's disk, so that scans are encoded once; survives kills and full disks."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from semisam_core.files import write_atomically
from semisam_core.generalists.base import Generalist, VolumeGrid
from semisam_core.generalists.embedding_codec import Coded, decoded, encoded
from semisam_core.progress import ProgressCallback
from semisam_core.scratch import Scratch

logger = logging.getLogger(__name__)


_SUFFIX = ".safetensors"
_FORMAT = "3"
_ABANDONED_SECONDS = 3600  # a temporary file of this age was left by a process that was killed
_UNUSED_SECONDS = 14 * 24 * 3600  # an entry that nobody has asked for that long is of a study that has ended


def scan_key(volume: Tensor) -> str:
    """Return the SHA-256 of a scan's shape, data type and voxels, in hexadecimal."""
    digest = hashlib.sha256(json.dumps([list(volume.shape), str(volume.dtype)]).encode())
    for row in volume:  # of a turned view, only a row is copied
        digest.update(_bytes_of(row))
    return digest.hexdigest()


class _Kept(Mapping[int, Tensor]):
    """Embeddings of one scan in scratch, of which only what was asked for last takes memory."""

    def __init__(self, scratch: Scratch, units: Sequence[int]) -> None:
        self._scratch, self._units = scratch, units
        self._room: Tensor | None = None
        self._found: dict[int, Tensor] = {}

    def add(self, unit: int, embedding: Tensor) -> None:
        """Keep a copy."""
        if self._room is None:  # one file for all: each holds a file descriptor
            self._room = self._scratch.zeros((len(self._units), *embedding.shape))
        place = self._room[len(self._found)]
        same = place.shape == embedding.shape
        self._found[unit] = place.copy_(embedding) if same else self._scratch.keep(embedding)
        self._scratch.release()

    def __getitem__(self, unit: int) -> Tensor:
        self._scratch.release()
        return self._found[unit]

    def __contains__(self, unit: object) -> bool:
        return unit in self._found

    def __iter__(self) -> Iterator[int]:
        return (unit for unit in self._units if unit in self._found)

    def __len__(self) -> int:
        return len(self._found)


class EmbeddingStore:
    """A bounded cache of embeddings, one file each, coded to about a third of half precision.

    Losing a file costs only time. A damaged file is deleted and counts as absent, and a failed write is reported once
    and otherwise ignored. Several processes may share the folder.

    A study passes over its scans again and again. When they exceed the limit, evicting the least recently used would
    always remove what is needed next. So entries that were not used for two weeks are evicted first, then those whose
    names, which are hashes, come last: every pass finds the same ones, about limit / size of all.

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
        scratch: Scratch | None = None,
    ) -> Mapping[int, Tensor]:
        """Return the embeddings of a scan's units; only those not yet stored are encoded.

        Values are as they would be read (`embedding_codec`), whether an embedding was stored or has just been computed.

        Args:
            generalist: the model that encodes.
            scan_key: `scan_key(volume)`.
            volume: the scan (H, W, D).
            grid: its voxels.
            units: embedding units, as from `generalist.units`.
            progress: called with (units ready, units needed), at the start and after each chunk.
            scratch: where to keep them; None for memory.

        Returns:
            unit -> embedding, float32.
        """
        names = {unit: entry_name(generalist, scan_key, grid, unit) for unit in units}
        found = _Kept(scratch or Scratch(), list(names))
        for unit, name in names.items():
            if (embedding := self._read(name)) is not None:
                found.add(unit, embedding)
        absent = [unit for unit in names if unit not in found]
        self.hits += len(found)
        self.misses += len(absent)
        if progress:
            progress(len(found), len(names))
        room = _Room(self._folder, self._limit)
        for start in range(0, len(absent), self._chunk):
            made = generalist.embed(volume, grid, absent[start : start + self._chunk])
            for unit, embedding in made.items():
                coded = encoded(embedding)
                found.add(unit, embedding.float() if coded is None else decoded(coded))
                if coded is not None:
                    self._keep(names[unit], _serialised(names[unit], coded), room)
            if progress:
                progress(len(found), len(names))
        if absent:
            _Room(self._folder, self._limit).make(0)  # another process may have written meanwhile
        return found

    def _read(self, name: str) -> Tensor | None:
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                coded = Coded(file.get_tensor("codes"), file.get_tensor("steps"), file.get_tensor("shape"))
            if metadata.get("checksum") != _checksum(name, coded):
                raise ValueError("the file was altered")
            embedding = decoded(coded)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # marks the file as recently used
        return embedding

    def _keep(self, name: str, content: bytes, room: _Room) -> None:
        path = self._folder / f"{name}{_SUFFIX}"
        try:
            if room.make(len(content)):
                write_atomically(path, content)
                room.taken(path, len(content))
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


class _Room:
    """The store's files as they were when it was made, and what has changed through it since."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._limit, self._now = limit, time.time()
        files = list(_files(folder))
        self._used = sum(file.size for file in files)
        for file in files:
            if file.temporary and self._now - file.used_s > _ABANDONED_SECONDS:
                self._remove(file)
        entries = [file for file in files if not file.temporary]
        # In the order in which they are kept: the last one is evicted first.
        self._kept = sorted(entries, key=self._rank)

    def make(self, incoming: int) -> bool:
        """Evict until so many bytes fit; False if they cannot."""
        if incoming > self._limit:
            return False
        while self._used + incoming > self._limit and self._kept:
            self._remove(self._kept.pop())
        return self._used + incoming <= self._limit

    def taken(self, path: Path, size: int) -> None:
        """Count a file that was written."""
        self._used += size
        bisect.insort(self._kept, _File(path, size, self._now, False), key=self._rank)

    def _rank(self, file: _File) -> tuple[bool, str]:
        return self._now - file.used_s > _UNUSED_SECONDS, file.path.name

    def _remove(self, file: _File) -> None:
        with contextlib.suppress(OSError):
            file.path.unlink()
            self._used -= file.size


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
    used_s: float
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
            yield _File(Path(entry.path), status.st_size, status.st_mtime, temporary)


def _serialised(name: str, coded: Coded) -> bytes:
    tensors = {"codes": coded.codes, "steps": coded.steps, "shape": coded.shape}
    return save(tensors, {"checksum": _checksum(name, coded)})


def _checksum(name: str, coded: Coded) -> str:
    """Return a checksum that binds an embedding's values and shape to its name."""
    digest = hashlib.sha256(json.dumps([name, coded.shape.tolist()]).encode())
    digest.update(_bytes_of(coded.steps))
    digest.update(_bytes_of(coded.codes))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
