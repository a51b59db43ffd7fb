"""Questions to sites that are under way: pushed one by one, their replies pulled one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

logger = logging.getLogger(__name__)
LIFETIME_IN_DEADLINES = 2


@dataclass(frozen=True)
class Clock:
    """Time as the server sees it; tests bring their own.

    Attributes:
        now: seconds of a clock that never goes back.
        sleep: waits for so many seconds.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass
class SentMessage:
    """One message that has been sent and not been answered.

    Attributes:
        identifier: Flower's name of the message.
        node: who was asked.
        site: the name that this node has joined by; empty while joining.
        kind: the message type.
        round: the round that was asked about.
        due: when its deadline ends, on the server's clock.
        over: whether nobody waits for the answer any more; if one comes, it is late.
    """

    identifier: str
    node: int
    site: str
    kind: str
    round: int
    due: float
    over: bool = False


class Mailbox:
    """Sends sent_messages and brings in replies.

    A message lives twice as long as its deadline, so that an answer that comes late can still be told from none; then
    Flower drops it. A message to a node that stops its heartbeats is answered by Flower with an error whose source is
    Flower's own node: which site it is about is known by the message alone.

    Args:
        grid: Flower's way to the sites.
        clock: the server's clock.
    """

    def __init__(self, grid: Grid, clock: Clock) -> None:
        self._grid, self._clock = grid, clock
        self._sent: dict[str, SentMessage] = {}
        self._connected: dict[int, str] = {}
        self._registered: dict[int, str] = {}

    def connected(self) -> Mapping[int, str]:
        """Return the nodes that Flower has heard of lately, in order, and when each last came online."""
        try:
            nodes = sorted(self._grid.get_nodes(), key=lambda node: node.node_id)
        except httpx.HTTPStatusError as error:
            logger.warning("The SuperLink did not say who is connected: %s", error)
            return self._connected
        self._registered |= {node.node_id: node.name for node in nodes}
        self._connected = {node.node_id: node.last_activated_at for node in nodes}
        return self._connected

    def registered(self, node: int) -> str:
        """Return the name that a node's key was registered by; empty where there are no keys, as in simulations."""
        return self._registered.get(node, "")

    def ask(self, node: int, site: str, kind: str, number: int, content: RecordDict, deadline_s: float) -> bool:
        """Send one sent; return whether Flower took it."""
        lifetime = LIFETIME_IN_DEADLINES * deadline_s
        message = Message(content, dst_node_id=node, message_type=kind, ttl=lifetime, group_id=str(number))
        try:
            identifier = next(iter(self._grid.push_messages([message])), None)
        except httpx.HTTPStatusError as error:
            logger.warning("The SuperLink did not take a message: %s", error)
            return False
        if not identifier:
            return False
        due = self._clock.now() + deadline_s
        self._sent[identifier] = SentMessage(identifier, node, site, kind, number, due)
        return True

    def under_way(self, kind: str, number: int | None = None) -> list[SentMessage]:
        """Return the sent_messages of a kind (and a round) that are still waited for."""
        return [
            each for each in self._sent.values() if each.kind == kind and not each.over and number in (None, each.round)
        ]

    def asked(self, kind: str) -> list[SentMessage]:
        """Return all sent_messages of a kind that have no answer yet, waited for or not."""
        return [each for each in self._sent.values() if each.kind == kind]

    def sweep(self) -> Iterator[tuple[SentMessage, Message | None]]:
        """Yield what has arrived, None where it cannot be read; one reply at a time is held in memory.

        Where the SuperLink answers by an error, as when its database is busy, that says nothing of the site: it is
        asked again at the next sweep, until the deadline.
        """
        for identifier in list(self._sent):
            try:
                replies = list(self._grid.pull_messages([identifier]))
            except httpx.HTTPStatusError as error:
                logger.warning("The SuperLink did not answer for a reply: %s", error)
                continue
            except Exception as error:  # of whatever a site sent; where Flower itself is gone, all else fails too
                logger.warning("A reply could not be pulled", exc_info=error)
                yield self._sent.pop(identifier), None
                continue
            for reply in replies:
                if reply.metadata.reply_to_message_id == identifier and identifier in self._sent:
                    yield self._sent.pop(identifier), reply

    def overdue(self) -> list[SentMessage]:
        """Return the sent_messages whose deadline has just ended; from now on their answers are late."""
        now = self._clock.now()
        found = [each for each in self._sent.values() if not each.over and now >= each.due]
        for each in found:
            each.over = True
        return found
