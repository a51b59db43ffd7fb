"""Flower's SuperLink behind two doors: sites reach the fleet API at the public one, and nothing else.

Flower serves three APIs at one port. Two of them, control and runtime, ask for no proof of who calls: whoever holds
the study's CA certificate could submit code to every site. Here the public port serves the few paths that SuperNodes
call, and all else is served at a second port of this machine's loopback address only.

This file is run as a program, with Python's `-P`, and imports nothing of this project: a SuperLink must not find code
of ours beside the code that was submitted to it.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = "127.0.0.1"
FLEET = "/v1/fleet/"
# What an authenticated SuperNode calls. Registering is not among it: only the lead does that.
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
# Tensors travel in pieces of 5 MiB; without a bound, a caller who proved nothing could fill the memory.
MAXIMUM_BODY = 32 * 2**20
GRACE_S = 3


class _BodyTooLargeError(Exception):
    """A caller sent more than any SuperNode does."""


class TwoDoors:
    """An ASGI app that lets a request through by the port it came in at.

    Args:
        app: Flower's SuperLink.
        control_port: requests that arrived here, at the loopback address, may call anything.
        on_refused: told the client's address and what it asked for.
    """

    def __init__(self, app: Application, control_port: int, on_refused: Callable[[str, str], None]) -> None:
        self._app, self._control, self._on_refused = app, (LOOPBACK, control_port), on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what may be served at this door, answer 404 to the rest."""
        if scope["type"] == "lifespan" or _door(scope) == self._control:
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or (scope["method"], scope["path"]) not in PUBLIC:
            self._on_refused(str((scope.get("client") or ("?",))[0]), f"{scope.get('method', '')} {scope['path']!r}")
            await _answer(scope, receive, send, 404)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on an allowed request, with a bounded body and a host name of our own.

        Flower's checks read the path out of an address that is put together with the caller's Host header.
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
                if not whole:  # answered before the caller was done: what it goes on sending is not waited for
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        try:
            await self._app(inner, bounded, noted)
        except _BodyTooLargeError:
            if not started:
                await _answer(scope, receive, send, 413)


def _door(scope: Scope) -> tuple[str, int] | None:
    server = scope.get("server")
    return None if server is None else (server[0], server[1])


async def _answer(scope: Scope, receive: Receive, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens; an IPv6 address in brackets or not.

    Raises:
        OSError: the port is taken or the address is not of this machine.
    """
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(256)
    return listening


def superlink(control_port: int, database: Path, tls: Path) -> Application:
    """Return Flower's SuperLink, which believes that it serves the loopback port only."""
    from flwr.common.constant import ISOLATION_MODE_SUBPROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    files = [tls / name for name in ("ca.crt", "server.crt", "server.key")]
    ca, certificate, key = (path.read_bytes() for path in files)
    config = SuperLinkLifespanConfig(
        control_address=f"{LOOPBACK}:{control_port}",
        health_server_address=None,
        host=LOOPBACK,
        port=control_port,
        insecure=False,
        certificates=(ca, certificate, key),
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(files[0]),
        ssl_certfile=str(files[1]),
        ssl_keyfile=str(files[2]),
        database=str(database),
        isolation=ISOLATION_MODE_SUBPROCESS,
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def main() -> None:
    """Serve until told to stop."""
    import logging

    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config

    parser = argparse.ArgumentParser(description="A SuperLink whose control API is not public.")
    parser.add_argument("--host", required=True, help="address that sites reach")
    parser.add_argument("--port", type=int, required=True, help="port that sites reach")
    parser.add_argument("--control-port", type=int, required=True, help="loopback port of everything else")
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--tls", type=Path, required=True, help="folder of ca.crt, server.crt, server.key")
    given = parser.parse_args()
    logger = logging.getLogger("flwr")
    seen: set[str] = set()

    def on_refused(client: str, asked: str) -> None:
        if client not in seen and len(seen) < 1000:  # a stranger must not be able to fill the disk with lines
            seen.add(client)
            logger.warning("%s asked at the public port for what is not served there: %.200s", client, asked)

    # Bound before anything else: a taken port must not touch the database of the SuperLink that has it.
    sockets = [listening_socket(given.host, given.port), listening_socket(LOOPBACK, given.control_port)]
    app = TwoDoors(superlink(given.control_port, given.database, given.tls), given.control_port, on_refused)
    config = uvicorn.Config(
        app,
        lifespan="on",
        proxy_headers=False,  # who calls, and at which door, is what the connection says
        access_log=False,
        log_config=get_uvicorn_log_config(logging.INFO),
        ssl_certfile=str(given.tls / "server.crt"),
        ssl_keyfile=str(given.tls / "server.key"),
        timeout_graceful_shutdown=GRACE_S,
    )
    uvicorn.Server(config).run(sockets=sockets)


if __name__ == "__main__":
    main()
