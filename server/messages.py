"""Messages to sites: pushed one by one, their replies pulled one by one."""

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
    """The server's clock; tests bring their own.

    Attributes:
        now: seconds of a monotonic clock.
        sleep: waits for a number of seconds.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass
class SentMessage:
    """A message that has not been answered yet.

    Attributes:
        identifier: Flower's message id.
        node: the node it went to.
        site: the name that this node joined under; empty while joining.
        kind: the message type.
        round: the round it is about.
        deadline: when the server stops waiting for the reply, on the server's clock.
        expired: whether the server has stopped waiting; a reply that still comes is late.
    """

    identifier: str
    node: int
    site: str
    kind: str
    round: int
    deadline: float
    expired: bool = False


class Mailbox:
    """Sends messages and collects replies.

    A message lives for twice its deadline, so that a late reply can be told from none; then Flower drops it. If a node
    stops sending heartbeats, Flower itself replies with an error whose source is Flower's own node: only the message id
    tells which site it is about.

    Args:
        grid: Flower's connection to the sites.
        clock: the server's clock.
    """

    def __init__(self, grid: Grid, clock: Clock) -> None:
        self._grid, self._clock = grid, clock
        self._sent: dict[str, SentMessage] = {}
        self._connected: dict[int, str] = {}
        self._registered: dict[int, str] = {}

    def connected(self) -> Mapping[int, str]:
        """Return node -> when it last came online, of all connected nodes, in order."""
        try:
            nodes = sorted(self._grid.get_nodes(), key=lambda node: node.node_id)
        except httpx.HTTPStatusError as error:
            logger.warning("The SuperLink did not say who is connected: %s", error)
            return self._connected
        self._registered |= {node.node_id: node.name for node in nodes}
        self._connected = {node.node_id: node.last_activated_at for node in nodes}
        return self._connected

    def registered(self, node: int) -> str:
        """Return the name that a node's key is registered under; empty without keys, as in simulations."""
        return self._registered.get(node, "")

    def send(self, node: int, site: str, kind: str, number: int, content: RecordDict, deadline_s: float) -> bool:
        """Send a message; return whether Flower accepted it."""
        lifetime = LIFETIME_IN_DEADLINES * deadline_s
        message = Message(content, dst_node_id=node, message_type=kind, ttl=lifetime, group_id=str(number))
        try:
            identifier = next(iter(self._grid.push_messages([message])), None)
        except httpx.HTTPStatusError as error:
            logger.warning("The SuperLink did not accept a message: %s", error)
            return False
        if not identifier:
            return False
        deadline = self._clock.now() + deadline_s
        self._sent[identifier] = SentMessage(identifier, node, site, kind, number, deadline)
        return True

    def awaited(self, kind: str, number: int | None = None) -> list[SentMessage]:
        """Return the messages of a kind (and a round) whose replies the server is waiting for."""
        return [each for each in self.unanswered(kind) if not each.expired and number in (None, each.round)]

    def unanswered(self, kind: str) -> list[SentMessage]:
        """Return all messages of a kind without a reply, expired ones included."""
        return [each for each in self._sent.values() if each.kind == kind]

    def collect(self) -> Iterator[tuple[SentMessage, Message | None]]:
        """Yield the replies that have arrived, None for one that cannot be read; only one is in memory at a time.

        An error from the SuperLink, such as a busy database, says nothing about the site: the reply is asked for again
        at the next call, until the deadline.
        """
        for identifier in list(self._sent):
            try:
                replies = list(self._grid.pull_messages([identifier]))
            except httpx.HTTPStatusError as error:
                logger.warning("The SuperLink did not hand over a reply: %s", error)
                continue
            except Exception as error:  # whatever a site sent; if Flower itself is gone, everything else fails too
                logger.warning("A reply could not be pulled", exc_info=error)
                yield self._sent.pop(identifier), None
                continue
            for reply in replies:
                if reply.metadata.reply_to_message_id == identifier and identifier in self._sent:
                    yield self._sent.pop(identifier), reply

    def expire(self) -> list[SentMessage]:
        """Return the messages whose deadline has just passed; replies to them are late from now on."""
        now = self._clock.now()
        found = [each for each in self._sent.values() if not each.expired and now >= each.deadline]
        for each in found:
            each.expired = True
        return found
