"""Bounds on what a reader may take: bytes, voxels, seconds, memory, and the folder that files may not leave."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import resource
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from intake.volume import IntakeError
from semisam_core.errors import SemiSAMError

JSON_BYTES = 64_000_000  # the largest BIDS and nnU-Net descriptions have a few megabytes
JSON_DEPTH = 32
START_SECONDS = 120.0  # for a child to import what it needs, on a busy machine
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[][{}]', re.DOTALL)
_READY = b"ready"
_CHUNK = 1 << 20
_GIB = 1 << 30

Request = Mapping[str, Any]
Entry = Callable[[Request], dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """What one file or series may cost.

    Attributes:
        file_bytes: size of one file on disk.
        voxels: voxels of one volume, all frames and channels.
        seconds: time to read and write one case.
        memory_bytes: memory of the process that reads it.
    """

    file_bytes: int = 8 * _GIB
    voxels: int = 1_500_000_000
    seconds: float = 600.0
    memory_bytes: int = 16 * _GIB


LIMITS = Limits()


def inside(root: Path, path: Path) -> Path:
    """Return a path with all links resolved.

    Raises:
        IntakeError: it leaves `root`, by a link or by `..`, or its name is no text.
    """
    try:
        os.fspath(path).encode()  # names in another encoding than UTF-8 cannot be written down
        base, real = root.resolve(strict=True), path.resolve(strict=True)
    except UnicodeEncodeError:
        raise IntakeError(f"{shown(path)}: its name, or a folder's, is not in UTF-8; rename it.") from None
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, or a NUL in the name
        raise IntakeError(f"{shown(path)}: the file cannot be reached ({type(error).__name__}).") from None
    if not real.is_relative_to(base):
        raise IntakeError(f"{shown(path)}: it leads out of the folder {base}; only files inside it are read.")
    return real


def shown(text: object, longest: int = 200) -> str:
    """Return text from a file or a name so that it can be printed: one line, no control characters, not too long."""
    plain = "".join(c if c.isprintable() else "?" for c in str(text))
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def check_file(path: Path, limits: Limits = LIMITS) -> None:
    """Check that a path is a regular file of a bearable size.

    Raises:
        IntakeError: it is not.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise IntakeError(f"{shown(path)}: the file cannot be reached ({type(error).__name__}).") from None
    if not path.is_file():
        raise IntakeError(f"{shown(path)}: it is no regular file.")
    if status.st_size > limits.file_bytes:
        raise IntakeError(
            f"{shown(path)}: the file has {status.st_size / _GIB:.1f} GiB; at most {limits.file_bytes / _GIB:.1f} are "
            "read."
        )


def check_shape(path: Path, shape: tuple[int, ...], limits: Limits = LIMITS) -> None:
    """Check a shape that a header claims, before any voxel is read.

    Raises:
        IntakeError: a side is not positive, or there are too many voxels.
    """
    if not shape or min(shape) < 1 or math.prod(shape) > limits.voxels:
        raise IntakeError(
            f"{shown(path)}: its header claims the shape {shown(shape, 80)}; accepted are up to {limits.voxels:.2g} "
            "voxels."
        )


def check_affine(path: Path, affine: np.ndarray[Any, Any]) -> None:
    """Check an affine from voxels to millimetres.

    Raises:
        IntakeError: it is not finite, or flat, or its numbers are beyond any scanner.
    """
    sane = np.isfinite(affine).all() and np.abs(affine).max() < 1e6
    with np.errstate(all="ignore"):
        if not sane or not 1e-9 < abs(np.linalg.det(affine[:3, :3])) < 1e9:
            raise IntakeError(f"{shown(path)}: its voxel sizes and directions are not usable.")


def inflated_prefix(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of what a gzip file holds, without inflating more.

    Raises:
        IntakeError: it is no gzip file.
    """
    stream, out = zlib.decompressobj(wbits=31), b""
    try:
        with path.open("rb") as file:
            while len(out) < count and (chunk := file.read(_CHUNK)):
                out += stream.decompress(chunk, count - len(out))
                if stream.eof:
                    break
    except (OSError, zlib.error):
        raise IntakeError(f"{shown(path)}: the gzip file is damaged.") from None
    return out


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """Read a JSON file whose size and depth are bounded.

    Raises:
        IntakeError: it is too large, too deep, or no JSON.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise IntakeError(f"{shown(path)}: the file cannot be read ({error.strerror}).") from None
    if len(raw) > most:
        raise IntakeError(f"{shown(path)}: the file is larger than {most / 1e6:g} MB.")
    if _depth(raw) > JSON_DEPTH:
        raise IntakeError(f"{shown(path)}: its JSON is nested more than {JSON_DEPTH} deep.")
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise IntakeError(f"{shown(path)}: the file is no valid JSON in UTF-8.") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _depth(raw: bytes) -> int:
    """Return how deep brackets outside of strings nest."""
    deepest = depth = 0
    for found in _TOKENS.finditer(raw):
        depth += 1 if found[0] in b"[{" else -1 if found[0] in b"]}" else 0
        deepest = max(deepest, depth)
        if deepest > JSON_DEPTH:
            break
    return deepest


class Worker(AbstractContextManager["Worker"]):
    """A child process that reads one file or series after another, so that none can hang or end the parent.

    Requests and answers are JSON: a decoder that a hostile file has taken over can send no object to the parent.

    Args:
        entry: a function at the top level of a module, called in the child.
        limits: seconds per call, and memory of the child beyond what it has once it is ready.
    """

    def __init__(self, entry: Entry, limits: Limits = LIMITS) -> None:
        self._entry, self._limits = entry, limits
        self._context = multiprocessing.get_context("spawn")
        self._child: SpawnProcess | None = None
        self._line: Connection | None = None

    def call(self, request: Request) -> dict[str, Any]:
        """Return what `entry(request)` returns.

        Raises:
            IntakeError: `entry` refused, took too long, needed too much memory, or the process ended.
        """
        try:
            line = self._ready()
            line.send_bytes(json.dumps(request).encode())
            if not line.poll(self._limits.seconds):
                self.close()
                raise IntakeError(f"reading took longer than {self._limits.seconds:g} seconds and was given up.")
            answer = json.loads(line.recv_bytes(JSON_BYTES))
        except (EOFError, OSError, ValueError):
            code = self.close()
            raise IntakeError(f"the process that read it ended unexpectedly (exit status {code}).") from None
        if "refused" in answer:
            raise IntakeError(str(answer["refused"]))
        done: dict[str, Any] = answer["done"]
        return done

    def close(self) -> int | None:
        """End the child and return its exit status."""
        if self._line is not None:
            self._line.close()
        child, self._child, self._line = self._child, None, None
        if child is None:
            return None
        child.join(0.2)
        if child.is_alive():
            child.kill()
        child.join()
        return child.exitcode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def _ready(self) -> Connection:
        if self._line is None:
            self._line, theirs = self._context.Pipe()
            self._child = self._context.Process(
                target=_serve, args=(self._entry, theirs, self._limits.memory_bytes), daemon=True
            )
            self._child.start()
            theirs.close()
            if not self._line.poll(START_SECONDS) or self._line.recv_bytes() != _READY:
                self.close()
                raise IntakeError("the process that reads scans did not start.")
        return self._line


def _serve(entry: Entry, line: Connection, memory_bytes: int) -> None:
    """Answer requests until the parent closes the line."""
    has = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")  # data and stack
    resource.setrlimit(resource.RLIMIT_DATA, (has + memory_bytes, has + memory_bytes))
    line.send_bytes(_READY)
    while True:
        try:
            request = json.loads(line.recv_bytes())
        except EOFError:
            return
        line.send_bytes(json.dumps(_answered(entry, request, memory_bytes)).encode())


def _answered(entry: Entry, request: Request, memory_bytes: int) -> dict[str, Any]:
    try:
        return {"done": entry(request)}
    except SemiSAMError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"it needs more than {memory_bytes / _GIB:.1f} GiB of memory."}
    except Exception as error:  # noqa: BLE001 - decoders raise anything; one file must not end the import
        return {"refused": f"it cannot be read ({type(error).__name__}: {shown(error)})."}
