"""The public door, by itself: what passes, what is refused, and what a passing request looks like inside."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployment.lead.doors import FLEET_CALLS, MAXIMUM_BODY, PUBLIC, TwoDoors

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
    """What Flower's app would have been given."""

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
def test_what_supernodes_call_passes(call: str) -> None:
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
def test_a_call_by_another_method_does_not_pass(method: str) -> None:
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
def test_a_door_that_is_not_known_to_be_the_inner_one_is_the_public_one(server: Any) -> None:
    assert _ask(_request("/v1/control/start-run", server=server))[0] == 404


def test_the_host_that_a_caller_names_does_not_get_in() -> None:
    headers = [(b"host", b"x/v1/control?"), (b"host", b"y"), (b"flwr-public-key", b"k")]
    _, inside, _ = _ask(_request("/v1/fleet/pull-messages", headers=headers))
    assert inside.scopes[0]["headers"] == [(b"flwr-public-key", b"k"), (b"host", b"superlink")]


def test_a_body_larger_than_any_piece_of_a_model_is_cut_off() -> None:
    piece = bytes(MAXIMUM_BODY // 4)
    assert _ask(_request("/v1/fleet/push-object"), (piece,) * 4)[0] == 200
    assert _ask(_request("/v1/fleet/push-object"), (piece,) * 4 + (b"x",))[0] == 413
