"""Reads an audit log back and says whether it is as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.audit_log import BEGINS, BROKEN, NOTHING, REPAIRED, AuditLog, Head, line_hash, parsed
from semisam_core.errors import ConfigError

SHOWN = 20


@dataclass
class AuditCheck:
    """What a check of a log found.

    Attributes:
        entries: number of lines in the chain.
        last: SHA-256 of the last of them.
        files: number of files.
        problems: what is not as it was written; a log without problems is whole.
        notes: what happened to the log and is on record in it, such as a line that a kill cut short.
    """

    entries: int = 0
    last: str = NOTHING
    files: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seal(self) -> str:
        """Number of lines and hash of the last: kept elsewhere, it shows later whether the log was replaced."""
        return f"{self.entries}:{self.last}"


def read_entries(log: AuditLog) -> Iterator[dict[str, Any]]:
    """Return every entry that can be read, whether or not it is part of a chain, in the order of the files.

    Raises:
        OSError: a file cannot be read.
    """
    for path in _files(log):
        for line in _lines(path.read_bytes()):
            if (entry := parsed(line)) is not None:
                yield entry


def check_log(log: AuditLog, seal: str | None = None) -> AuditCheck:
    """Check a log: every line against the one before, and the end against the signed record of it.

    Args:
        log: the log; nobody writes to it meanwhile.
        seal: `AuditCheck.seal` of an earlier check, which this log must continue.

    Raises:
        OSError: a file cannot be read, or another process held the log for 30 s.
        ConfigError: the seal is none.
    """
    count, _, digest = (seal or f"0:{NOTHING}").partition(":")
    if not count.isdecimal() or len(digest) != len(NOTHING):
        raise ConfigError(f"{seal}: a seal is a number, a colon and 64 hexadecimal digits")
    with log.locked():
        walk = _Walk()
        for path in _files(log):
            walk.file(path)
        walk.missing(log)
        found = walk.found
        head, reason = log.head()
        if head is None and (found.files or log.secret_path.exists()):
            found.problems.append(f"{reason}; whether lines were cut from the end is not known")
        if head is not None:
            found.problems += _against(head, found, log)
    if walk.hashes_at(int(count)) != digest:
        found.problems.append(f"the log does not continue the one that {seal} was noted for")
    more = len(found.problems) - SHOWN
    if more > 0:
        found.problems[SHOWN:] = [f"and {more} more"]
    return found


class _Walk:
    """Follows the chain from file to file."""

    def __init__(self) -> None:
        self.found = AuditCheck()
        self._place = Head()
        self._outside = b""
        self._hashes = {0: NOTHING}

    def hashes_at(self, number: int) -> str | None:
        """Return the hash of the line of this number."""
        return self._hashes.get(number)

    def file(self, path: Path) -> None:
        """Follow the chain through one file."""
        self.found.files += 1
        content = path.read_bytes()
        for number, line in enumerate(_lines(content), start=1):
            self._line(f"{path.name}, line {number}", line)
        if content and not content.endswith(b"\n"):
            self.found.problems.append(f"{path.name}: the last line is cut short")
        if self._outside:
            self.found.problems.append(f"{path.name}: {len(self._outside)} bytes at its end are not part of the chain")
            self._outside = b""

    def missing(self, log: AuditLog) -> None:
        """Note full files beyond a gap in their numbers."""
        known = {path.name for path in _files(log)}
        pattern = f"{log.path.stem}-{'[0-9]' * 6}{log.path.suffix}"
        for path in sorted(log.path.parent.glob(pattern)):
            if path.name not in known:
                self.found.problems.append(f"{path.name}: a file before it is missing")

    def _line(self, where: str, line: bytes) -> None:
        entry = parsed(line)
        if entry is None or "previous" not in entry or type(entry.get("number")) is not int:
            self._outside += line + b"\n"
            return
        if not self._place.follows(line):
            expected = f"line {self._place.count + 1} of the chain after {self._place.last[:12]}"
            self.found.problems.append(f"{where}: is not {expected}; a line was changed, removed, added or moved")
        self._own(where, entry)
        digest = line_hash(line)
        self._place = Head(entry["number"], digest)
        self._hashes[entry["number"]] = digest
        self.found.entries, self.found.last = entry["number"], digest

    def _own(self, where: str, entry: dict[str, Any]) -> None:
        """Compare what lies before a line with what the line says of it."""
        kind, outside = entry.get("kind"), self._outside
        self._outside = b""
        own = kind in (BEGINS, REPAIRED)
        said, expected = (entry.get("outside_bytes"), entry.get("outside_sha256")) if own else (0, line_hash(b""))
        if said and len(outside) - 1 == said and not outside[:said].endswith(b"\n"):
            outside = outside[:said]  # a torn line, and the line break that keeps it apart from the next
        if (len(outside), line_hash(outside)) != (said, expected):
            self.found.problems.append(f"{where}: what is written before it is not part of the chain")
        if kind == BROKEN:
            self.found.problems.append(f"{where}: at {entry.get('time')} {entry.get('reason_kept_here')}")
        if kind == BEGINS:
            self.found.notes.append(
                f"{where}: the chain begins here; the {entry.get('lines')} lines before it were written without one "
                "and are only known to be unchanged since"
            )
        if kind == REPAIRED:
            self.found.notes.append(
                f"{where}: a process was killed while it wrote; {entry.get('unconfirmed_lines')} lines before this one "
                f"and {said} bytes were never confirmed by who wrote them, and nothing left on their account"
            )


def _against(head: Head, found: AuditCheck, log: AuditLog) -> list[str]:
    """Return how a log's end differs from the record of it."""
    size = log.path.stat().st_size if log.path.exists() else 0
    files = len(_files(log)) - log.path.exists()
    moved = (files, size) == (head.files + 1, 0)  # killed between renaming a full file and saying so
    if found.entries > head.count:
        return [
            f"the lines after line {head.count} of the chain were not confirmed by who wrote them: a process was "
            "killed meanwhile, or somebody added them; the next entry will put that on record"
        ]
    if (found.entries, found.last) != (head.count, head.last):
        return [f"the log ends with line {found.entries}, but {head.count} were written, or the last is another"]
    if not moved and (size, files) != (head.size, head.files):
        return [
            f"{log.path.name} has {size} bytes after {files} full files; as written, {head.size} after {head.files}"
        ]
    return []


def _files(log: AuditLog) -> list[Path]:
    """Return the files of a log, oldest first."""
    found, number = [], 1
    while (path := log.full_file(number)).exists():
        found.append(path)
        number += 1
    return [*found, log.path] if log.path.exists() else found


def _lines(content: bytes) -> list[bytes]:
    """Return a file's lines without their line breaks."""
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]
