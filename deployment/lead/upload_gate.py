"""Stands between the public port and Flower, and lets each site upload what `uploads.py` allows.

A caller is recognised by the signed headers of its request, before any of the body is read. What is refused is answered
with an HTTP status, on which a SuperNode gives up that message, or tries again if it asked for too much at once (503).

Imports nothing of this project but its siblings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Protobuf

from deployment.lead.doors import FLEET, Application, Message, Receive, Scope, Send, answer
from deployment.lead.uploads import (
    CONFLICT,
    LATER,
    MALFORMED,
    NO_SPACE,
    SMALL,
    TOO_LARGE,
    UNKNOWN,
    Ledger,
    Pace,
    RefusedError,
    Size,
)

# A SuperNode has at most two objects on their way up, two on their way down, a heartbeat and a question.
AT_ONCE = 8
REQUESTS_PER_S = 200.0
BURST_OF_OBJECTS = 8  # requests at once after a pause, in objects of a reply
OTHER_BODY = 2**16
OBJECT_FRAME = 2**12  # identifiers beside an object's content
ID_BYTES = 128  # an object's entry in an announcement; 70 were seen
ANNOUNCEMENT_FRAME = 2**14

logger = logging.getLogger("flwr")
Parsed = TypeVar("Parsed", bound=Protobuf)
Answering = Callable[[Send], Awaitable[None]]


@dataclass(frozen=True)
class Caller:
    """A registered site.

    Attributes:
        node: Flower's number for it.
        name: the name that it was admitted under.
    """

    node: int
    name: str


class Store(Protocol):
    """What the gate asks the SuperLink's database and disk."""

    def identify(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        """Return whose signature these headers carry, or None if they carry none of a registered site."""

    def missing(self, roots: set[str]) -> set[str]:
        """Return which of these objects are in the store no more."""

    def free_bytes(self) -> int:
        """Return how many bytes are free on the database's disk."""


class _Site:
    """What the gate remembers of a site."""

    def __init__(self, name: str) -> None:
        self.name, self.ledger, self.pace = name, Ledger(), Pace(REQUESTS_PER_S)
        self.served, self.announces = 0, False
        self.told: set[tuple[str, int]] = set()

    async def keep_pace(self, cost: float) -> None:
        """Wait until the site may be served so many requests."""
        largest = self.ledger.largest or SMALL
        await asyncio.sleep(self.pace.wait_s(cost, BURST_OF_OBJECTS * largest.objects))


class UploadGate:
    """An ASGI app that serves sites within bounds.

    Args:
        app: Flower's SuperLink.
        store: its database and disk.
        size_of: from a message's kind to the bounds of its reply.
        reserve_bytes: how much of the disk must stay free for replies to be accepted.
    """

    def __init__(self, app: Application, store: Store, size_of: Callable[[str], Size], reserve_bytes: int) -> None:
        self._app, self._store, self._size_of, self._reserve = app, store, size_of, reserve_bytes
        self._sites: dict[int, _Site] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request of a site within its bounds, refuse it otherwise."""
        if not scope["path"].startswith(FLEET):
            return await self._app(scope, receive, send)
        try:
            caller = await asyncio.to_thread(self._store.identify, dict(scope["headers"]))
        except Exception as error:
            logger.error("A caller could not be recognised", exc_info=error)
            return await answer(scope, receive, send, LATER)
        if caller is None:
            return await answer(scope, receive, send, UNKNOWN)
        if (site := self._sites.get(caller.node)) is None:
            site = self._sites[caller.node] = _Site(caller.name)
        call = scope["path"].removeprefix(FLEET)
        try:
            await self._admit(site, call, scope, receive, send)
        except RefusedError as refused:
            self._log(site, call, refused)
            await answer(scope, receive, send, refused.status)

    async def _admit(self, site: _Site, call: str, scope: Scope, receive: Receive, send: Send) -> None:
        if site.served >= AT_ONCE:
            raise RefusedError(LATER, f"more than {AT_ONCE} requests at once")
        site.served += 1
        try:
            body = await _whole(scope, receive, _largest_body(site, call))
            if body is not None:
                await self._serve(site, call, body, partial(self._app, scope, _again(body, receive)), send)
        finally:
            site.served -= 1

    async def _serve(self, site: _Site, call: str, body: bytes, app: Answering, send: Send) -> None:
        if call == "push-messages":
            await self._announce(site, body, app, send)
            return
        await site.keep_pace(1)
        if call == "push-object":
            pushed = _parsed(PushObjectRequest, body)
            site.ledger.book(pushed.object_id, len(pushed.object_content))
            del pushed
        await app(self._watched(site, send) if call == "pull-messages" else send)

    async def _announce(self, site: _Site, body: bytes, app: Answering, send: Send) -> None:
        """Serve an announcement: one at a time, since each locks the database for as long as it has objects."""
        if site.announces:
            raise RefusedError(LATER, "two announcements at once")
        site.announces = True
        try:
            asked = _parsed(PushMessagesRequest, body)
            if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
                raise RefusedError(MALFORMED, "an announcement of another number of replies than one")
            about, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
            objects = [each.object_id for each in _nodes_of(tree)]
            if tree.object_id != about.message_id:
                raise RefusedError(MALFORMED, "an announcement whose objects are not those of its reply")
            await site.keep_pace(len(objects))
            if await asyncio.to_thread(self._store.free_bytes) < self._reserve:
                raise RefusedError(NO_SPACE, f"less than {self._reserve // 10**6} MB of the disk are free")
            site.ledger.release(await asyncio.to_thread(self._store.missing, site.ledger.roots - {tree.object_id}))
            site.ledger.announce(about.reply_to_message_id, tree.object_id, objects)
            await app(send)
        finally:
            site.announces = False

    def _watched(self, site: _Site, send: Send) -> Send:
        """Return `send`, noting the messages that are handed to a site before it gets them."""
        pieces: list[bytes] = []

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.body":
                pieces.append(message.get("body", b""))
                if not message.get("more_body", False):
                    self._note(site, b"".join(pieces))
            await send(message)

        return watching

    def _note(self, site: _Site, handed: bytes) -> None:
        try:
            messages = _parsed(PullMessagesResponse, handed).messages_list
        except RefusedError:  # an error's JSON
            return
        for message in messages:
            about = message.metadata
            site.ledger.ask(about.run_id, about.message_id, self._size_of(about.message_type))

    def _log(self, site: _Site, call: str, refused: RefusedError) -> None:
        """Log what a site is refused for, once for each call and status: it must not fill the disk with lines."""
        if (call, refused.status) not in site.told:
            site.told.add((call, refused.status))
            logger.warning("%s: refused %s: %s. Later ones of this kind are not logged.", site.name, call, refused)


def _largest_body(site: _Site, call: str) -> int:
    if call not in ("push-object", "push-messages"):
        return OTHER_BODY
    largest = site.ledger.largest
    if largest is None:
        raise RefusedError(CONFLICT, "it was not asked for anything")
    if call == "push-object":
        return largest.object_bytes + OBJECT_FRAME
    return largest.objects * ID_BYTES + ANNOUNCEMENT_FRAME


async def _whole(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """Return a request's body, or None if the caller has gone.

    Raises:
        RefusedError: it is larger than `most`; no more than that was read.
    """
    too_large = RefusedError(TOO_LARGE, f"a request of more than {most} bytes")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > most:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that hands over a body that was read before, and then goes on."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def _parsed(kind: type[Parsed], body: bytes) -> Parsed:
    """Parse a protobuf message.

    Raises:
        RefusedError: it is none.
    """
    message: Parsed = kind()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise RefusedError(MALFORMED, "what is no protobuf message of this call") from None
    return message


def _nodes_of(tree: ObjectTree) -> Iterator[ObjectTree]:
    yield tree
    for child in tree.children:
        yield from _nodes_of(child)
