"""A network link between a site and the server that can be slow and can be cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from types import TracebackType

CHUNK = 16 * 1024
TICK_S = 0.05
LOOPBACK = "127.0.0.1"


class Line:
    """Forwards TCP connections from its own port to another, unchanged, TLS included.

    Args:
        port: the target port.
        bytes_per_s: throughput of both directions together; may be changed at any time.
    """

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self._target, self.bytes_per_s = port, bytes_per_s
        self._lock, self._ended, self._due = threading.Lock(), threading.Event(), 0.0
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.carried = 0
        self.port = 0
        self.restore()
        self._start(self._accept)

    @property
    def address(self) -> str:
        """The server's address over this line."""
        return f"{LOOPBACK}:{self.port}"

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
            sockets, self._open = self._open, set()
        for each in [*sockets, *([] if listener is None else [listener])]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def restore(self) -> None:
        """Accept connections again, on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, self.port))
        listener.listen(32)
        listener.settimeout(TICK_S)
        self.port = listener.getsockname()[1]
        with self._lock:
            self._listener = listener

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                listener = self._listener
            try:
                if listener is None:
                    time.sleep(TICK_S)
                    continue
                near, _ = listener.accept()
            except OSError:
                continue
            try:
                far = socket.create_connection((LOOPBACK, self._target), timeout=5)
            except OSError:  # the server is down, and the site must see that
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            self._start(self._carry, near, far)

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while not self._ended.is_set():
                for key, _ in ready.select(TICK_S):
                    content = key.fileobj.recv(CHUNK)  # type: ignore[union-attr]
                    if not content:
                        raise OSError
                    self._wait_for(len(content))
                    key.data.sendall(content)
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def _wait_for(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now) + size / self.bytes_per_s
            wait = self._due - now
            self.carried += size
        time.sleep(wait)
