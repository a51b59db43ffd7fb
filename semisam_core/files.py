"""Atomic writes: a reader sees the whole file or none, even after a crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor


def utc_stamp() -> str:
    """Return the current time as it stands in logs and records, for example 2026-03-01T09:30:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """Write beside the target, flush to disk, then rename over it. The umask applies to `mode`.

    Args:
        path: the target.
        content: bytes, or their parts in order, of which one at a time is in memory.
        mode: of the file.

    Raises:
        OSError: the disk is full or the folder is not writable; the target is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in (content,) if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically.

    Raises:
        OSError: as in `write_atomically`.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, dict(metadata) if metadata else None))


@dataclass(frozen=True)
class TensorParts:
    """A tensor that is made in parts while it is written.

    Attributes:
        dtype: float16, int32, int64 or bool.
        shape: of the whole tensor.
        parts: returns its values in array order, in tensors of any size.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    parts: Callable[[], Iterable[Tensor]]


_DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.float16: "F16", torch.bool: "BOOL"}


def save_tensor_parts(path: Path, tensors: Mapping[str, TensorParts], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, atomically, with one part of one tensor in memory at a time.

    The library's own writer needs all of a file in memory.

    Raises:
        OSError: as in `write_atomically`.
        ValueError: the parts of a tensor are not what was said of it.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, each in ordered.items():
        begin, end = end, end + math.prod(each.shape) * each.dtype.itemsize
        header[name] = {"dtype": _DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end]}
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)

    def content() -> Iterable[bytes | memoryview]:
        yield len(said).to_bytes(8, "little") + said
        for name, each in ordered.items():
            wrong = ValueError(f"{path}: the parts of the tensor {name} are not of its type and shape")
            missing = math.prod(each.shape)
            for part in each.parts():
                missing -= part.numel()
                if part.dtype is not each.dtype or missing < 0:
                    raise wrong
                yield part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if missing:
                raise wrong

    write_atomically(path, content())


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, keys sorted."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write and flush it to disk.

    Raises:
        OSError: the line could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(content, sort_keys=True) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a kill tore the last line; keep this one apart from it
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: only part of a line was written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return every intact line of a JSON-lines file; torn lines are skipped, and a missing file counts as empty."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines
