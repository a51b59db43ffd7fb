"""Atomic writes: a reader sees the whole file or none, even after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write beside the target, flush to disk, then rename over it. The umask applies to `mode`.

    Raises:
        OSError: the disk is full or the folder is not writable; the target is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
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
