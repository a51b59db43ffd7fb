"""Flower's grid, at which an answer that is still being uploaded holds up no other.

Flower hands a reply over as soon as a site has announced it, and then waits for its tensors: three minutes after the
last piece that came, two hours in all. A line that is cut in an upload, or a site that sends a piece now and then,
would keep the server from hearing anybody else, and from ending a round at its deadline.
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
    """Passes everything on to Flower's grid, and goes on pulling in the background what takes long.

    A reply whose tensors are all there is pulled while the caller waits, so that one is in memory at a time. Of those
    that take longer there are at most so many; the caller gets nothing for them until they are there. One that has
    been under way for half an hour no longer counts: a site may begin one in every round, and must not fill all places.

    Args:
        grid: Flower's way to the sites; its pulling must allow several threads.
        patience_s: how long one pull is waited for, in seconds.
        at_once: how many pulls may be under way.
        now: seconds of a clock that never goes back.
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
        """Pass the run's description on."""
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
        """Return the numbers of the nodes that are connected."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are connected."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their identifiers."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there whole.

        Raises:
            Exception: whatever pulling one of them raised.
        """
        return [reply for each in message_ids for reply in self._pulled(each)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass a question with its wait on."""
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
        # A daemon, since a program that ends must not wait for what a site never sends.
        self.thread = threading.Thread(target=self._work, args=(grid, identifier), name="pull", daemon=True)
        self.thread.start()

    def _work(self, grid: Grid, identifier: str) -> None:
        try:
            self._replies = list(grid.pull_messages([identifier]))
        except Exception as error:  # noqa: BLE001 (raised again where the reply is asked for)
            self._error = error

    def result(self) -> list[Message]:
        if self._error is not None:
            raise self._error
        return self._replies
