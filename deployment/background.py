"""Programs that run in the background: what is recorded of them, and one command at a time that changes them."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from engines.processes import birth
from semisam_core.files import write_json


@dataclass(frozen=True)
class ProcessRecord:
    """A program in the background, known by more than its process number, which another process may get later.

    Attributes:
        pid: its process number.
        birth: what tells it from any other process of that number.
        mark: what all its children carry in their environment, see `ProcessTree`.
    """

    pid: int
    birth: str
    mark: str

    @classmethod
    def of(cls, pid: int, mark: str) -> ProcessRecord:
        """Return the record of a running process."""
        return cls(pid, birth(psutil.Process(pid)), mark)

    @classmethod
    def read(cls, path: Path) -> ProcessRecord | None:
        """Return the record in a file, or None if there is none or it cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(content["pid"]), str(content["birth"]), str(content["mark"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the record to a file, atomically."""
        write_json(path, asdict(self))

    @property
    def process(self) -> psutil.Process | None:
        """This very process if it is alive, else None."""
        try:
            process = psutil.Process(self.pid)
            same = birth(process) == self.birth and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if same else None

    @property
    def alive(self) -> bool:
        """Whether this very process runs."""
        return self.process is not None


@contextlib.contextmanager
def exclusive(lock: Path, busy: Exception) -> Iterator[None]:
    """Hold a lock file while in the `with`; the system releases it however this process ends.

    Args:
        lock: the file; its folder is made, for its owner only.
        busy: raised if another process holds it.
    """
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
