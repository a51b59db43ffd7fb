"""A proxy between a site and the server that ends TLS on both sides and keeps every byte in the clear."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

LOOPBACK = "127.0.0.1"
TICK_S = 0.2
PEER_S = 30.0
PIECE = 64 * 1024


@dataclass
class Exchange:
    """One connection: what the site sent and what it received."""

    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)


class Capture:
    """Forwards connections to a server.

    Args:
        port: the server's.
        tls: folder of ca.crt, by which the server is checked, and of server.crt and server.key, which the site trusts.
    """

    def __init__(self, port: int, tls: Path) -> None:
        self._target, self._ended = port, threading.Event()
        self._near = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._near.load_cert_chain(tls / "server.crt", tls / "server.key")
        self._far = ssl.create_default_context(cafile=str(tls / "ca.crt"))
        self.exchanges: list[Exchange] = []
        self._listener = socket.create_server((LOOPBACK, 0))
        self._listener.settimeout(TICK_S)
        self.address = f"{LOOPBACK}:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self) -> None:
        """Accept no more connections and end those there are."""
        self._ended.set()
        self._listener.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, work: object, *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                try:
                    plain, _ = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                self._start(self._carry, plain)

    def _carry(self, plain: socket.socket) -> None:
        exchange = Exchange()
        with contextlib.suppress(OSError, ValueError):
            plain.settimeout(PEER_S)
            near = self._near.wrap_socket(plain, server_side=True)
            far = self._far.wrap_socket(
                socket.create_connection((LOOPBACK, self._target), PEER_S), server_hostname=LOOPBACK
            )
            self.exchanges.append(exchange)
            with contextlib.closing(near), contextlib.closing(far):
                self._pump({near: (far, exchange.sent), far: (near, exchange.received)})

    def _pump(self, ways: dict[ssl.SSLSocket, tuple[ssl.SSLSocket, bytearray]]) -> None:
        # Both directions in one thread: OpenSSL must not read and write one connection at once.
        while not self._ended.is_set():
            ready = [each for each in ways if each.pending()] or select.select(list(ways), [], [], TICK_S)[0]
            for source in ready:
                target, record = ways[source]
                piece = _received(source)
                if piece == b"":
                    return
                if piece is not None:
                    record += piece
                    target.sendall(piece)


def _received(source: ssl.SSLSocket) -> bytes | None:
    """Return what has arrived; empty at the end, None if it was nothing of the site's or server's own."""
    source.settimeout(0)
    try:
        return source.recv(PIECE)
    except ssl.SSLWantReadError:
        return None
    finally:
        source.settimeout(PEER_S)
