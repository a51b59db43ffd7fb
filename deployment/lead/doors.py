"""The SuperLink's two doors: what each port serves, and how much a connection to the public one may take.

Flower serves three APIs on one port. Two of them, control and runtime, do not authenticate callers: anyone holding the
study's CA certificate could submit code to every site. So the public port serves only the few paths that SuperNodes
call; everything else is served on a second port, bound to this machine's loopback address.

Imports nothing of Flower and nothing of this project.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Address = tuple[str, int]

LOOPBACK = "127.0.0.1"
FLEET = "/v1/fleet/"
# The calls of an authenticated SuperNode. Registration is not one of them: only the lead registers.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
PUBLIC = frozenset({("GET", "/health"), *(("POST", FLEET + call) for call in FLEET_CALLS)})
# Tensors travel in chunks of 5 MiB; without a bound, an unauthenticated caller could fill the memory.
MAXIMUM_BODY = 32 * 2**20

logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Bounds:
    """What a connection to the public port may take.

    Attributes:
        per_address: connections from one address. Many sites may share one, behind a NAT; each holds a handful.
        total: connections from all addresses.
        handshake_s: from the connection to the end of the TLS handshake.
        headers_s: from there, or from the last answer, until a request's headers are complete.
        stall_s: without a byte of a request whose body is incomplete.
        request_s: for a request and its answer.
    """

    per_address: int = 256
    total: int = 2048
    handshake_s: float = 10.0
    headers_s: float = 20.0
    stall_s: float = 60.0
    request_s: float = 600.0


class _Connection(asyncio.Protocol):
    """A connection to the public port: passes everything to uvicorn's protocol and ends when it takes too long."""

    def __init__(self, peer: Address, bounds: Bounds, inner: asyncio.Protocol, on_end: Callable[[_Connection], None]):
        self.peer, self._bounds, self._inner, self._on_end = peer, bounds, inner, on_end
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._limit: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._requests = 0
        self.handshake: asyncio.Task[None] | None = None

    @property
    def waits(self) -> bool:
        """Whether no request is being served."""
        return self._requests == 0

    def end(self) -> None:
        """End the connection at once; the peer is not asked to agree."""
        if self._transport is not None:
            self._transport.abort()
        elif self.handshake is not None:
            self.handshake.cancel()

    def request_began(self) -> None:
        """Note that a request's headers are complete."""
        self._requests += 1
        self._end_in(self._bounds.request_s)
        self._expect_body()

    def body_complete(self) -> None:
        """Note that the request has arrived whole."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def answered(self) -> None:
        """Note that a request has been answered."""
        self._requests -= 1
        if self._requests == 0:
            self.body_complete()
            self._end_in(self._bounds.headers_s)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._end_in(self._bounds.headers_s)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._stall is not None:
            self._expect_body()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.body_complete()
        if self._limit is not None:
            self._limit.cancel()
        self._on_end(self)
        self._inner.connection_lost(exc)

    def _expect_body(self) -> None:
        self.body_complete()
        self._stall = self._loop.call_later(self._bounds.stall_s, self.end)

    def _end_in(self, seconds: float) -> None:
        if self._limit is not None:
            self._limit.cancel()
        self._limit = self._loop.call_later(seconds, self.end)


class PublicDoor:
    """Accepts connections to the public port, within bounds.

    A newcomer that finds all places taken gets that of the connection that has waited longest without a request, so
    that idle connections never lock a site out.

    Args:
        listening: the listening socket.
        bounds: what a connection may take.
        tls: the server's side of TLS.
        protocol: makes what speaks HTTP on a new connection.
    """

    def __init__(
        self, listening: socket.socket, bounds: Bounds, tls: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listening, self._bounds, self._tls, self._protocol = listening, bounds, tls, protocol
        self._open: dict[Address, _Connection] = {}  # oldest first

    async def accept(self) -> None:
        """Accept connections until cancelled."""
        self._listening.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listening)
            except OSError as error:
                logger.warning("A connection could not be accepted: %s", error)
                await asyncio.sleep(0.2)
                continue
            peer = (str(address[0]), int(address[1]))
            if not self._has_room(peer[0]):
                accepted.close()
            else:
                connection = self._open[peer] = _Connection(peer, self._bounds, self._protocol(), self._forget)
                connection.handshake = loop.create_task(self._greet(connection, accepted))
            await asyncio.sleep(0)  # a flood of connections must not starve those being served

    def watched(self, app: Application) -> Application:
        """Return `app`, reporting each request's progress to its connection."""

        async def watching(scope: Scope, receive: Receive, send: Send) -> None:
            connection = self._open.get(tuple(scope.get("client") or ("", 0)))
            if connection is None:  # the loopback port
                return await app(scope, receive, send)

            async def received() -> Message:
                message = await receive()
                if not message.get("more_body", False):
                    connection.body_complete()
                return message

            connection.request_began()
            try:
                await app(scope, received, send)
            finally:
                connection.answered()

        return watching

    async def _greet(self, connection: _Connection, accepted: socket.socket) -> None:
        loop, seconds = asyncio.get_running_loop(), self._bounds.handshake_s
        try:
            await loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self._tls, ssl_handshake_timeout=seconds, ssl_shutdown_timeout=seconds
            )
        except (OSError, asyncio.CancelledError):
            self._forget(connection)
            accepted.close()

    def _has_room(self, host: str) -> bool:
        """Make room for a connection from `host` where there is none; return whether there is now."""
        mine = [each for each in self._open.values() if each.peer[0] == host]
        if len(mine) >= self._bounds.per_address:
            return self._end_oldest(mine)
        return len(self._open) < self._bounds.total or self._end_oldest(list(self._open.values()))

    def _end_oldest(self, connections: list[_Connection]) -> bool:
        oldest = next((each for each in connections if each.waits), None)
        if oldest is None:
            return False
        self._forget(oldest)
        oldest.end()
        return True

    def _forget(self, connection: _Connection) -> None:
        if self._open.get(connection.peer) is connection:
            del self._open[connection.peer]


class _BodyTooLargeError(Exception):
    """A caller sent more than any SuperNode sends."""


class TwoDoors:
    """An ASGI app that serves a request according to the port it arrived on.

    Args:
        app: Flower's SuperLink.
        control_port: requests that arrive on this port of the loopback address may call anything.
        on_refused: called with the client's address and the refused request.
        public: the app as sites see it; the same one if not given.
    """

    def __init__(
        self,
        app: Application,
        control_port: int,
        on_refused: Callable[[str, str], None],
        public: Application | None = None,
    ) -> None:
        self._app, self._control, self._on_refused = app, (LOOPBACK, control_port), on_refused
        self._public = app if public is None else public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what this port may serve; answer 404 to everything else."""
        if scope["type"] == "lifespan" or _door(scope) == self._control:
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or (scope["method"], scope["path"]) not in PUBLIC:
            self._on_refused(str((scope.get("client") or ("?",))[0]), f"{scope.get('method', '')} {scope['path']!r}")
            await answer(scope, receive, send, 404)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on an allowed request, with a bounded body and our own host name.

        Flower's checks take the path from a URL that is built with the caller's Host header.
        """
        headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
        inner = {**scope, "headers": [*headers, (b"host", b"superlink")], "root_path": ""}
        started, whole, taken = False, scope["method"] == "GET", 0

        async def bounded() -> Message:
            nonlocal taken, whole
            message = await receive()
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > MAXIMUM_BODY:
                raise _BodyTooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not whole:  # answered before the caller was done: do not wait for the rest
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        try:
            await self._public(inner, bounded, noted)
        except _BodyTooLargeError:
            if not started:
                await answer(scope, receive, send, 413)


def _door(scope: Scope) -> tuple[str, int] | None:
    server = scope.get("server")
    return None if server is None else (server[0], server[1])


async def answer(scope: Scope, receive: Receive, send: Send, status: int) -> None:
    """Answer a request with nothing but a status, and end the connection."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
