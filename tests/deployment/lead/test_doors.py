"""The public door: which requests pass, what they look like inside, and how long a connection may take."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from deployment.lead.doors import FLEET_CALLS, MAXIMUM_BODY, PUBLIC, Bounds, PublicDoor, TwoDoors
from deployment.lead.pki import write_certificates
from deployment.lead.superlink import listening_socket

CONTROL_PORT, PUBLIC_PORT = 8444, 8443
TRICKS = (
    "/v1/control/start-run",
    "/v1/runtime/get-nodes",
    "//v1/control/start-run",
    "/v1//control/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages/",
    "//v1/fleet/pull-messages",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/fleet/pull-messages\x00",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/docs",
    "/openapi.json",
    "/",
    "",
)


class Inside:
    """Stands in for Flower's app and keeps what reaches it."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def _request(path: str, port: int = PUBLIC_PORT, host: str = "127.0.0.1", **changes: Any) -> dict[str, Any]:
    request = {"type": "http", "method": "POST", "path": path, "server": (host, port), "client": ("192.0.2.1", 1)}
    return request | {"headers": [], "root_path": ""} | changes


def _ask(scope: dict[str, Any], pieces: tuple[bytes, ...] = (b"",)) -> tuple[int | None, Inside, list[tuple[str, str]]]:
    inside, refused, sent = Inside(), [], []
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if scope["type"] == "websocket":
            return {"type": "websocket.connect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    doors = TwoDoors(inside, CONTROL_PORT, lambda *what: refused.append(what))
    asyncio.run(doors(scope, receive, send))
    return (sent[0].get("status") if sent else None), inside, refused


@pytest.mark.parametrize("call", FLEET_CALLS)
def test_the_calls_of_supernodes_pass(call: str) -> None:
    status, inside, refused = _ask(_request(f"/v1/fleet/{call}"))
    assert status == 200
    assert len(inside.scopes) == 1
    assert refused == []


@pytest.mark.parametrize("path", TRICKS)
def test_nothing_else_passes_the_public_door(path: str) -> None:
    status, inside, refused = _ask(_request(path))
    assert status == 404
    assert inside.scopes == []
    assert refused[0][0] == "192.0.2.1"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "post", "CONNECT"])
def test_no_other_method_passes(method: str) -> None:
    assert _ask(_request("/v1/fleet/pull-messages", method=method))[0] == 404


@given(st.text())
def test_no_path_but_the_listed_ones_passes(path: str) -> None:
    status, inside, _ = _ask(_request(path))
    assert (status == 200) == (("POST", path) in PUBLIC)
    assert bool(inside.scopes) == (("POST", path) in PUBLIC)


def test_a_websocket_does_not_pass() -> None:
    scope = {key: value for key, value in _request("/v1/fleet/pull-messages").items() if key != "method"}
    _, inside, refused = _ask(scope | {"type": "websocket"})
    assert inside.scopes == []
    assert refused


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/get-nodes", "/docs"])
def test_everything_passes_the_loopback_door(path: str) -> None:
    assert _ask(_request(path, CONTROL_PORT))[0] == 200


@pytest.mark.parametrize("server", [None, ("192.0.2.9", CONTROL_PORT), ("127.0.0.1", PUBLIC_PORT)])
def test_a_port_not_known_to_be_the_loopback_one_counts_as_public(server: Any) -> None:
    assert _ask(_request("/v1/control/start-run", server=server))[0] == 404


def test_the_callers_host_header_does_not_reach_the_app() -> None:
    headers = [(b"host", b"x/v1/control?"), (b"host", b"y"), (b"flwr-public-key", b"k")]
    _, inside, _ = _ask(_request("/v1/fleet/pull-messages", headers=headers))
    assert inside.scopes[0]["headers"] == [(b"flwr-public-key", b"k"), (b"host", b"superlink")]


def test_a_body_larger_than_any_chunk_of_a_model_is_cut_off() -> None:
    piece = bytes(MAXIMUM_BODY // 4)
    assert _ask(_request("/v1/fleet/push-object"), (piece,) * 4)[0] == 200
    assert _ask(_request("/v1/fleet/push-object"), (piece,) * 4 + (b"x",))[0] == 413


# request_s is more than SLACK_S above headers_s, so that the one in place of the other shows.
SHORT = Bounds(per_address=6, total=8, handshake_s=0.5, headers_s=0.8, stall_s=1.2, request_s=4.0)
# As few places, and so much time that none is freed by it.
PATIENT = Bounds(per_address=6, total=8, handshake_s=60, headers_s=60, stall_s=60, request_s=60)
SLACK_S = 2.0
MADE_ROOM_S = 15.0
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


@dataclass
class Served:
    """A public door on a thread of its own.

    Attributes:
        port: where it listens.
        tls: the client's side of TLS.
        answer: the app answers once this is set.
    """

    port: int
    tls: ssl.SSLContext
    answer: threading.Event = field(default_factory=threading.Event)

    def connect(self, host: str = "127.0.0.1") -> ssl.SSLSocket:
        """Return a connection from a loopback address, whose TLS handshake is done."""
        link = self.tls.wrap_socket(self.open(host), server_hostname="localhost")
        link.settimeout(SHORT.request_s + SLACK_S)
        return link

    def open(self, host: str = "127.0.0.1") -> socket.socket:
        """Return a connection from a loopback address that has not spoken TLS yet."""
        return socket.create_connection(("127.0.0.1", self.port), 5, source_address=(host, 0))


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Served]:
    """Serve an app behind a public door that allows little time."""
    with _serving(tmp_path, SHORT) as served:
        yield served


@pytest.fixture
def patient_door(tmp_path: Path) -> Iterator[Served]:
    """Serve an app behind a public door that allows much time."""
    with _serving(tmp_path, PATIENT) as served:
        yield served


@contextlib.contextmanager
def _serving(tmp_path: Path, bounds: Bounds) -> Iterator[Served]:
    """Serve an app that reads a request, then waits to answer."""
    write_certificates(tmp_path, "atrium", [], 30)
    listening = listening_socket("127.0.0.1", 0)
    served = Served(listening.getsockname()[1], ssl.create_default_context(cafile=str(tmp_path / "ca.crt")))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        while not served.answer.is_set():
            await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    loop = asyncio.new_event_loop()

    async def serve() -> None:
        files = {"ssl_certfile": str(tmp_path / "server.crt"), "ssl_keyfile": str(tmp_path / "server.key")}
        config = uvicorn.Config(app, lifespan="off", http="h11", log_level="critical", **files)  # type: ignore[arg-type]
        config.load()
        server = uvicorn.Server(config)
        assert config.ssl is not None

        def protocol() -> asyncio.Protocol:
            return config.http_protocol_class(config, server.server_state, {})  # type: ignore[call-arg, operator, return-value]

        public = PublicDoor(listening, bounds, config.ssl, protocol)
        config.loaded_app = public.watched(config.loaded_app)
        await public.accept()

    task = loop.create_task(serve())
    thread = threading.Thread(target=_run, args=(loop, task))
    thread.start()
    try:
        yield served
    finally:
        served.answer.set()
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        listening.close()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)


def _lasted(link: socket.socket, drip: bytes = b"") -> float:
    """Return how many seconds it takes until the server ends the connection, while `drip` is sent over and over."""
    began = time.monotonic()
    link.settimeout(0.1 if drip else SHORT.request_s + SLACK_S)
    while time.monotonic() - began < max(2 * SHORT.request_s + SLACK_S, MADE_ROOM_S):
        try:
            if drip:
                link.sendall(drip)
            if link.recv(100) == b"":
                return time.monotonic() - began
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - began
    raise AssertionError("the connection is still open")


def test_a_connection_that_never_speaks_tls_ends(door: Served) -> None:
    with door.open() as link:
        assert SHORT.handshake_s / 2 < _lasted(link) < SHORT.handshake_s + SLACK_S


@pytest.mark.parametrize("drip", [b"", b"P"], ids=["idle", "one byte of a header at a time"])
def test_a_connection_that_completes_no_headers_ends(door: Served, drip: bytes) -> None:
    with door.connect() as link:
        assert SHORT.headers_s / 2 < _lasted(link, drip) < SHORT.headers_s + SLACK_S


def test_a_second_request_has_to_be_as_quick_as_the_first(door: Served) -> None:
    door.answer.set()
    with door.connect() as link:
        link.sendall(HEAD + b"body")
        assert link.recv(4096).startswith(b"HTTP/1.1 200")
        assert SHORT.headers_s / 2 < _lasted(link, b"P") < SHORT.headers_s + SLACK_S


def test_a_body_that_stops_arriving_ends_the_connection(door: Served) -> None:
    with door.connect() as link:
        link.sendall(HEAD)
        assert SHORT.stall_s / 2 < _lasted(link) < SHORT.stall_s + SLACK_S / 2


def test_a_body_that_trickles_may_take_as_long_as_a_request_and_no_longer(door: Served) -> None:
    with door.connect() as link:
        link.sendall(HEAD.replace(b": 4", b": 1000"))
        assert SHORT.stall_s < _lasted(link, b"x") < SHORT.request_s + SLACK_S


def test_a_request_that_arrived_whole_is_waited_for_longer_than_one_that_stalls(door: Served) -> None:
    with door.connect() as link:
        link.sendall(HEAD + b"body")
        threading.Timer(SHORT.stall_s + 0.5, door.answer.set).start()
        assert link.recv(4096).startswith(b"HTTP/1.1 200")


def test_the_oldest_idle_connection_of_an_address_makes_room_when_its_share_is_used_up(patient_door: Served) -> None:
    patient_door.answer.set()
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(patient_door.connect()) for _ in range(PATIENT.per_address + 1)]
        assert _lasted(links[0]) < MADE_ROOM_S
        assert all(_answers(link) for link in links[1:])
        assert _answers(stack.enter_context(patient_door.connect("127.0.0.2")))


def test_a_connection_with_a_request_never_makes_room(patient_door: Served) -> None:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(patient_door.connect()) for _ in range(PATIENT.per_address)]
        for link in links:
            link.sendall(HEAD + b"body")
        time.sleep(1)
        assert _lasted(stack.enter_context(patient_door.open())) < MADE_ROOM_S
        patient_door.answer.set()
        assert all(link.recv(4096).startswith(b"HTTP/1.1 200") for link in links)


def test_all_addresses_together_hold_no_more_than_the_total(patient_door: Served) -> None:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(patient_door.connect(f"127.0.0.{2 + k}")) for k in range(PATIENT.total + 1)]
        assert _lasted(links[0]) < MADE_ROOM_S


def test_a_connection_that_has_ended_frees_its_place(patient_door: Served) -> None:
    patient_door.answer.set()
    with patient_door.connect() as idle:
        for _ in range(2 * PATIENT.per_address):
            with patient_door.connect() as link:
                assert _answers(link)
        assert _answers(idle)


def _answers(link: socket.socket) -> bool:
    link.sendall(HEAD + b"body")
    return link.recv(4096).startswith(b"HTTP/1.1 200")
