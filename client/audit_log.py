"""The site's audit log: JSON lines, each with the hash of the line before, and a record of the end that is kept apart.

`audit.jsonl` is the current file and `audit-000001.jsonl`, ... are the full ones before it; one chain runs through all.
`audit-head.json` says how many lines there are and what the last one hashes to, signed with `audit-secret`, so that a
cut at the end shows too. A line counts once the head says so: whoever wrote it was not killed before. `audit_check.py`
reads all of it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from semisam_core.files import utc_stamp, write_atomically

ROTATE_BYTES = 16 * 2**20
LOCK_S, POLL_S = 30.0, 0.02
NOTHING = "0" * 64
# Entries that the log makes about itself.
BEGINS, REPAIRED, BROKEN = "chain-begins", "log-repaired", "log-broken"


@dataclass(frozen=True)
class Head:
    """The end of the log.

    Attributes:
        count: number of lines in the chain.
        last: SHA-256 of the last of them, without its line break.
        files: number of full files before the current one.
        size: bytes of the current file.
        tail: bytes of the last line in the current file, with its line break; 0 if the file is new.
    """

    count: int = 0
    last: str = NOTHING
    files: int = 0
    size: int = 0
    tail: int = 0

    def after(self, line: bytes, separator: int) -> Head:
        """Return the head once a line, given without its line break, follows; `separator` bytes come before it."""
        return Head(self.count + 1, line_hash(line), self.files, self.size + separator + len(line) + 1, len(line) + 1)

    def follows(self, line: bytes) -> bool:
        """Return whether a line, given without its line break, is the next one of the chain."""
        entry = parsed(line)
        return entry is not None and (entry.get("number"), entry.get("previous")) == (self.count + 1, self.last)


class AuditLog:
    """Appends to a site's audit log. Several processes may do so at once.

    Args:
        path: `audit.jsonl` in the site's storage.
        rotate_bytes: size from which a file is full.
    """

    def __init__(self, path: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        self.path, self._rotate_bytes = path, rotate_bytes

    @property
    def head_path(self) -> Path:
        """The record of the log's end."""
        return self.path.with_name(f"{self.path.stem}-head.json")

    @property
    def secret_path(self) -> Path:
        """The secret that the record of the log's end is signed with."""
        return self.path.with_name(f"{self.path.stem}-secret")

    def full_file(self, number: int) -> Path:
        """Return the path of the full file of this number, from 1."""
        return self.path.with_name(f"{self.path.stem}-{number:06d}{self.path.suffix}")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry and write both log and head to disk. What it speaks of may leave only afterwards.

        A line that an earlier writer did not finish, or a log that is not as its last writer left it, is put on record
        by an entry of its own first.

        Raises:
            OSError: the entry could not be written, or another process held the log for 30 s. It does not count.
        """
        with self.locked():
            secret = self._secret()
            head, about = self._continued(secret)
            if secret is None:
                secret = secrets.token_bytes(32)
                self._save(head, secret)  # before the secret: a kill between the two then looks like no log at all
                write_atomically(self.secret_path, secret.hex().encode(), mode=0o600)
            for each in about:  # in the same file as what they are about
                head = self._written(head, each)
                self._save(head, secret)
            self._save(self._written(self._rotated(head, secret), entry), secret)

    def head(self) -> tuple[Head | None, str]:
        """Return the record of the log's end, or None and why there is none that can be trusted."""
        secret = self._secret()
        try:
            content = json.loads(self.head_path.read_bytes())
            found = Head(**{name: content[name] for name in asdict(Head())})
            signature = str(content["signature"])
        except FileNotFoundError:
            return None, f"{self.head_path.name} is missing"
        except (OSError, ValueError, KeyError, TypeError):
            return None, f"{self.head_path.name} cannot be read"
        if secret is None:
            return None, f"{self.secret_path.name} is missing or damaged, so {self.head_path.name} cannot be trusted"
        if not hmac.compare_digest(signature.encode(), _signature(found, secret).encode()):
            return None, f"{self.head_path.name} was not written by this site: its signature is wrong"
        return found, ""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing.

        Raises:
            OSError: another process held the log for 30 s.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f"{self.path.stem}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(f"{lock}: another process has held the audit log for {LOCK_S:g} s") from None
                    time.sleep(POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _continued(self, secret: bytes | None) -> tuple[Head, list[dict[str, Any]]]:
        """Return where the log ends, and the entries to make about what was found there."""
        head, reason = self.head()
        begun = secret is not None and (head is None or head.count > 0)
        if not begun and not self.full_file(1).exists() and _last_in_chain(content := _read(self.path)) is None:
            begins = _own(BEGINS, lines=len(content.splitlines()), **_outside(content))
            return Head(size=len(content)), [begins] if content else []
        if head is None:
            return self._broken(Head(files=self._files()), reason)
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == 0 and head.size > 0:  # a kill between renaming a full file and saying so
            if not self.full_file(head.files + 1).exists():
                return self._broken(head, f"{self.path.name} is missing or empty")
            head = Head(head.count, head.last, head.files + 1)
        content = b""
        if size != head.size or head.tail:
            content = _read(self.path, head.size - head.tail)
        if len(content) < head.tail or (head.tail and line_hash(content[: head.tail - 1]) != head.last):
            return self._broken(head, f"{self.path.name} does not end as it did when it was last written")
        return _repaired(head, content[head.tail :])

    def _broken(self, head: Head, reason: str) -> tuple[Head, list[dict[str, Any]]]:
        """Return where to go on although the log is not as it was left, and the entry that says so."""
        content = _read(self.path)
        found = _last_in_chain(content)
        if head.count == 0 and found is not None:
            head = Head(found[0], found[1], head.files)
        entry = _own(BROKEN, reason_kept_here=reason, found_bytes=len(content))
        return Head(head.count, head.last, head.files, len(content)), [entry]

    def _files(self) -> int:
        """Return how many full files there are."""
        number = 0
        while self.full_file(number + 1).exists():
            number += 1
        return number

    def _rotated(self, head: Head, secret: bytes) -> Head:
        if head.size < self._rotate_bytes:
            return head
        full = self.full_file(head.files + 1)
        if full.exists():
            raise OSError(f"{full}: is in the way of the audit log; move it to another folder")
        os.rename(self.path, full)
        head = Head(head.count, head.last, head.files + 1)
        self._save(head, secret)
        return head

    def _written(self, head: Head, entry: Mapping[str, Any]) -> Head:
        """Append one line; undo what part of it was written if it cannot be."""
        line = json.dumps({**entry, "number": head.count + 1, "previous": head.last}, sort_keys=True).encode()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            separator = b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
            whole = separator + line + b"\n"
            try:
                if os.write(descriptor, whole) != len(whole):
                    raise OSError(f"{self.path}: only part of a line was written")
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        return head.after(line, len(separator))

    def _save(self, head: Head, secret: bytes) -> None:
        content = asdict(head) | {"signature": _signature(head, secret)}
        write_atomically(self.head_path, json.dumps(content, sort_keys=True).encode(), mode=0o600)

    def _secret(self) -> bytes | None:
        """Return the secret; None if there is none of 32 bytes."""
        try:
            found = bytes.fromhex(self.secret_path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None
        return found if len(found) == 32 else None


def line_hash(line: bytes) -> str:
    """Return the SHA-256 of a line, given without its line break."""
    return hashlib.sha256(line).hexdigest()


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line's content; None if it is torn or no mapping."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _signature(head: Head, secret: bytes) -> str:
    return hmac.new(secret, json.dumps(asdict(head), sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _own(kind: str, **content: Any) -> dict[str, Any]:
    """Return an entry of the log about itself."""
    return {"time": utc_stamp(), "kind": kind, **content}


def _outside(content: bytes) -> dict[str, Any]:
    """Return what an entry says of the bytes right before it that are not part of the chain."""
    return {"outside_bytes": len(content), "outside_sha256": line_hash(content)}


def _repaired(head: Head, unconfirmed: bytes) -> tuple[Head, list[dict[str, Any]]]:
    """Return the head after lines that follow it but that no writer confirmed, and the entry about them."""
    if not unconfirmed:
        return head, []
    *whole, torn = unconfirmed.split(b"\n")
    lines, outside = 0, b""
    for line in whole:
        if head.follows(line):
            head, outside, lines = head.after(line, len(outside)), b"", lines + 1
        else:
            outside += line + b"\n"
    outside += torn
    entry = _own(REPAIRED, unconfirmed_lines=lines, **_outside(outside))
    return Head(head.count, head.last, head.files, head.size + len(outside)), [entry]


def _last_in_chain(content: bytes) -> tuple[int, str] | None:
    """Return number and hash of the last line that claims to be part of a chain."""
    for line in reversed(content.split(b"\n")):
        entry = parsed(line)
        if entry is not None and type(entry.get("number")) is int and "previous" in entry:
            return entry["number"], line_hash(line)
    return None


def _read(path: Path, offset: int = 0) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, offset))
            return file.read()
    except FileNotFoundError:
        return b""
