"""Flower's grid, except that a reply still being uploaded does not block the others.

Flower hands over a reply as soon as a site has announced it and then waits for its tensors: three minutes after the
last chunk, two hours in total. A connection that breaks during an upload, or a site that sends a chunk now and then,
would keep the server from receiving other replies and from ending a round at its deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

PATIENCE_S = 5.0
AT_ONCE = 8
LONG_S = 1800.0


class PatientGrid(Grid):
    """Delegates to Flower's grid, and continues slow pulls in the background.

    A reply whose tensors have all arrived is pulled while the caller waits, so only one is in memory at a time. At most
    `at_once` slower ones are pulled in the background; the caller gets them once they are complete. A pull that has
    taken half an hour no longer counts towards the limit: otherwise a site that starts one every round would use it up.

    Args:
        grid: Flower's connection to the sites; its `pull_messages` must be thread-safe.
        patience_s: how long the caller waits for one pull, in seconds.
        at_once: how many pulls may run in the background.
        now: seconds of a monotonic clock.
    """

    def __init__(
        self,
        grid: Grid,
        patience_s: float = PATIENCE_S,
        at_once: int = AT_ONCE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._patience_s, self._at_once, self._now = grid, patience_s, at_once, now
        self._pulls: dict[str, _Pull] = {}

    def set_run(self, run: Run) -> None:
        """Pass on the run's description."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run, as Flower describes it."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a site."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the connected nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived completely.

        Raises:
            Exception: whatever pulling one of them raised.
        """
        return [reply for each in message_ids for reply in self._pulled(each)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass on messages, and wait for their replies."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _pulled(self, identifier: str) -> list[Message]:
        pull = self._pulls.get(identifier)
        if pull is None:
            now = self._now()
            if sum(each.began > now - LONG_S for each in self._pulls.values()) >= self._at_once:
                return []
            pull = self._pulls[identifier] = _Pull(self._grid, identifier, now)
            pull.thread.join(self._patience_s)
        if pull.thread.is_alive():
            return []
        return self._pulls.pop(identifier).result()


class _Pull:
    def __init__(self, grid: Grid, identifier: str, began: float) -> None:
        self.began = began
        self._replies: list[Message] = []
        self._error: Exception | None = None
        # A daemon, so that the program can exit without waiting for what a site never sends.
        self.thread = threading.Thread(target=self._work, args=(grid, identifier), name="pull", daemon=True)
        self.thread.start()

    def _work(self, grid: Grid, identifier: str) -> None:
        try:
            self._replies = list(grid.pull_messages([identifier]))
        except Exception as error:  # noqa: BLE001 (raised again when the reply is asked for)
            self._error = error

    def result(self) -> list[Message]:
        if self._error is not None:
            raise self._error
        return self._replies
