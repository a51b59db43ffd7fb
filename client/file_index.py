"""What a site knows about its files without opening them: content hashes, and verdicts on scans.

The index is a file of JSON lines in the site's storage that is only appended to, so that a kill costs one line at most
and several processes may write to it. Losing it, or any line of it, costs only time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semisam_core.files import append_json_line, read_json_lines, write_atomically

logger = logging.getLogger(__name__)

SETTLED_NS = 100_000_000
"""A file that changed less than this ago is not indexed: clocks of file systems tick too slowly to tell two writes
within a few milliseconds apart."""
SPARE_LINES = 1000  # lines that count no more, beyond which the file is rewritten


@dataclass(frozen=True)
class Verdict:
    """Whether a scan can be used under a plan; `reason` says why not, None if it can."""

    reason: str | None


class FileIndex:
    """Content hashes of files by path, size, times and inode, and verdicts on scans by content.

    Args:
        path: the index, in the site's storage.
        now_ns: the clock of the files' times, for tests.
    """

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._path, self._now_ns = path, now_ns
        self._hashes: dict[str, tuple[list[int], str]] = {}
        self._verdicts: dict[str, Verdict] = {}
        lines = self._read()
        if len(lines) > 2 * (len(self._hashes) + len(self._verdicts)) + SPARE_LINES:
            self._rewrite()

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file's content; the file is read only if it is new or has changed.

        Raises:
            OSError: the file cannot be read.
        """
        name, state = str(path.absolute()), _state(os.stat(path))
        known = self._hashes.get(name)
        if known is not None and known[0] == state:
            return known[1]
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            unchanged = _state(before) == _state(os.fstat(file.fileno()))
        settled = self._now_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS
        if unchanged and settled:
            self._hashes[name] = (_state(before), digest)
            self._append({"file": name, "state": _state(before), "sha256": digest})
        return digest

    def verdict(self, key: str) -> Verdict | None:
        """Return the verdict on a scan, or None if there is none."""
        return self._verdicts.get(key)

    def judge(self, key: str, verdict: Verdict) -> None:
        """Keep the verdict on a scan.

        Args:
            key: a hash of everything that the verdict depends on.
            verdict: the verdict.
        """
        if self._verdicts.get(key) != verdict:
            self._verdicts[key] = verdict
            self._append({"scan": key, "reason": verdict.reason})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            append_json_line(self._path, line)
        except OSError as error:
            logger.warning("The index of files could not be extended: %s", error.strerror)

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = read_json_lines(self._path)
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("The index of files is unreadable and is started anew: %s", error)
            self._path.unlink(missing_ok=True)
            return []
        for line in lines:
            self._take(line)
        return lines

    def _take(self, line: Any) -> None:
        """Take one line; whatever else stands there is ignored."""
        match line:
            case {"file": str(name), "state": [*state], "sha256": str(digest)} if len(digest) == 64:
                self._hashes[name] = (state, digest)
            case {"scan": str(key), "reason": (str() | None) as reason}:
                self._verdicts[key] = Verdict(reason)

    def _rewrite(self) -> None:
        hashes = [{"file": name, "state": state, "sha256": found} for name, (state, found) in self._hashes.items()]
        verdicts = [{"scan": key, "reason": verdict.reason} for key, verdict in self._verdicts.items()]
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in (*hashes, *verdicts))
        try:
            write_atomically(self._path, text.encode())
        except OSError as error:
            logger.warning("The index of files could not be rewritten: %s", error.strerror)


def _state(status: os.stat_result) -> list[int]:
    """Return what tells an unchanged file: size, time of its content, time of its inode, and inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
