"""What a site may upload: replies that it was asked for, each of bounded size, and only a few that were not collected.

Flower stores any number of objects of any size that an admitted SuperNode announces, before the server's code sees one
of them. Here is what it may announce and send. Imports nothing of Flower and nothing of this project.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

UPDATE = "train"  # the kind of message whose reply holds tensors
HELD = 4  # updates that may wait at the server for being collected: one in time, and late ones
ASKED = 16  # messages without an answer that are remembered

CONFLICT, TOO_LARGE, NO_SPACE, LATER, UNKNOWN, MALFORMED = 409, 413, 507, 503, 401, 400

logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Size:
    """Bounds of one reply.

    Attributes:
        objects: how many objects Flower makes of it.
        total_bytes: of all of them together.
        object_bytes: of one of them.
    """

    objects: int
    total_bytes: int
    object_bytes: int


# A reply without tensors: a few numbers for each class, or one word.
SMALL = Size(objects=32, total_bytes=2**20, object_bytes=2**18)


class RefusedError(Exception):
    """A call that is not served.

    Args:
        status: the HTTP status that says so.
        reason: completes "<site>: refused <call>: ...".
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class _Reply:
    """A message that was handed to a site, and what the site has sent in reply."""

    size: Size
    roots: set[str] = field(default_factory=set)
    objects: dict[str, int] = field(default_factory=dict)  # bytes by object, 0 until it is sent

    @property
    def taken(self) -> int:
        return sum(self.objects.values())


class Ledger:
    """What one site was asked for and what it has sent in reply, in the run that it was asked in last."""

    def __init__(self) -> None:
        self._run = 0
        self._asked: dict[str, _Reply] = {}  # by message, oldest first

    @property
    def largest(self) -> Size | None:
        """The largest size of what may be sent now; None if nothing may."""
        return max((reply.size for reply in self._asked.values()), key=lambda size: size.total_bytes, default=None)

    @property
    def roots(self) -> set[str]:
        """The objects by which announced replies are found in the store."""
        return {root for reply in self._asked.values() for root in reply.roots}

    def ask(self, run: int, message: str, size: Size) -> None:
        """Note that a message was handed to the site. A new run makes those of earlier ones void."""
        if run != self._run:
            self._run, self._asked = run, {}
        if len(self._asked) >= ASKED:
            oldest = next((each for each, reply in self._asked.items() if not reply.roots), None)
            if oldest is None:
                return
            del self._asked[oldest]
        self._asked[message] = _Reply(size)

    def release(self, roots: Collection[str]) -> None:
        """Note that replies are in the store no more."""
        self._asked = {each: reply for each, reply in self._asked.items() if not reply.roots & set(roots)}

    def announce(self, message: str, root: str, objects: Collection[str]) -> None:
        """Note that the site will send these objects in reply to a message.

        Raises:
            RefusedError: it was not asked, the objects are too many, or too much of it waits to be collected.
        """
        reply = self._asked.get(message)
        if reply is None:
            raise RefusedError(CONFLICT, "it was not asked for this reply")
        if len(objects) > reply.size.objects or len(reply.objects.keys() | set(objects)) > reply.size.objects:
            raise RefusedError(TOO_LARGE, f"a reply of more than {reply.size.objects} objects")
        held = sum(each.taken for key, each in self._asked.items() if key != message)
        if held + reply.size.total_bytes > HELD * max(each.size.total_bytes for each in self._asked.values()):
            raise RefusedError(NO_SPACE, f"{held} bytes of its earlier replies have not been collected")
        reply.roots.add(root)
        for each in objects:
            reply.objects.setdefault(each, 0)

    def book(self, identifier: str, size: int) -> None:
        """Note that the site sends an object, perhaps again.

        Raises:
            RefusedError: it was not announced, or is too large, or the reply becomes too large by it.
        """
        reply = next((each for each in self._asked.values() if identifier in each.objects), None)
        if reply is None:
            raise RefusedError(CONFLICT, "an object that it did not announce")
        if size > reply.size.object_bytes:
            raise RefusedError(TOO_LARGE, f"an object of more than {reply.size.object_bytes} bytes")
        before = reply.objects[identifier]
        if reply.taken - before + size > reply.size.total_bytes:
            raise RefusedError(TOO_LARGE, f"a reply of more than {reply.size.total_bytes} bytes")
        reply.objects[identifier] = max(before, size)


class Pace:
    """A bucket of requests that refills steadily: who has used it up waits.

    Args:
        per_second: how many requests per second.
        now: seconds of a monotonic clock.
    """

    def __init__(self, per_second: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._now = per_second, now
        self._spent, self._at = 0.0, now()

    def wait_s(self, cost: float, burst: float) -> float:
        """Take a number of requests; return after how many seconds they may be served.

        Args:
            cost: how many.
            burst: how many may be served at once after a pause.
        """
        now = self._now()
        self._spent = max(0.0, self._spent - (now - self._at) * self._per_second) + cost
        self._at = now
        return max(0.0, self._spent - burst) / self._per_second


class SizeFile:
    """The size of an update in the present run, which `lead run` writes before it submits one.

    Args:
        path: the file; without it only small replies are accepted.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stamp, self._size = path, 0, SMALL

    def of(self, kind: str) -> Size:
        """Return the bounds of the reply to a message of this kind."""
        return self._read() if kind.partition(".")[0] == UPDATE else SMALL

    def _read(self) -> Size:
        try:
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._size, self._stamp = Size(**json.loads(self._path.read_text())), stamp
        except (OSError, ValueError, TypeError) as error:
            logger.error("%s cannot be read, so no update is accepted: %s", self._path, error)
            return SMALL
        return self._size
