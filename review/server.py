"""Serves the page on this machine alone: loopback, a secret in every address, and no request beyond its bounds.

The standard library's server is enough for one person on one machine, and adds no code that must be trusted. What it
lacks is added here: who may ask (token, Host, Origin), how much, how long, and how many at once.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from review.desk import Desk
from semisam_core.errors import SemiSAMError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
SOCKET_S = 30.0  # without a byte, after which a connection is closed
REQUEST_S = 120.0  # after which it is closed in any case
MOST_CONNECTIONS = 16
MOST_BODY = 64 << 20  # bytes of a review: the runs of a mask that is drawn by hand take far less
PAGE = Path(__file__).parent / "page"
FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "codec.js": ("codec.js", "text/javascript; charset=utf-8"),
    "painting.js": ("painting.js", "text/javascript; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # under no-referrer, some browsers call the page's own origin null
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_SCAN = re.compile(r"scans/([0-9]{1,6})(/mask|/review|/hand-over|/slices/([0-2])/([0-9]{1,5}))?")


class _RefusedError(Exception):
    """A request that gets no answer but a status and a sentence."""

    def __init__(self, status: HTTPStatus, says: str) -> None:
        super().__init__(says)
        self.status = status


class PageServer(ThreadingHTTPServer):
    """The page of one desk, until `shutdown`.

    Args:
        desk: what it serves.
        port: 0 for a free one.

    Attributes:
        token: 256 random bits, without which nothing is answered.
        last_asked: when the last request with the token came, by `time.monotonic`.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS
    allow_reuse_address = False

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self.desk, self.token = desk, secrets.token_urlsafe(32)
        self.last_asked = time.monotonic()
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def origin(self) -> str:
        """Where the page is from, as browsers name it."""
        return f"http://{LOOPBACK}:{self.server_port}"

    @property
    def url(self) -> str:
        """The page's address, with the token."""
        return f"{self.origin}/{self.token}/"

    def serve_until_idle(self, idle_s: float) -> None:
        """Answer until the page ends the work, or nothing was asked for `idle_s` seconds."""
        self.last_asked = time.monotonic()
        serving = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        serving.start()
        try:
            while serving.is_alive() and time.monotonic() - self.last_asked < idle_s:
                serving.join(0.2)
        finally:
            self.shutdown()
            self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; above `MOST_CONNECTIONS` at once, close the connection."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and free the place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a connection broke, without its address, which holds the token."""
        logger.debug("A connection to the page broke.", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.0"  # one request a connection
    server_version, sys_version = "review", ""
    timeout = SOCKET_S

    def handle(self) -> None:
        """Answer one request, within `REQUEST_S`."""
        ending = threading.Timer(REQUEST_S, self._hang_up)
        ending.daemon = True
        ending.start()
        try:
            super().handle()
        finally:
            ending.cancel()

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: addresses hold the token."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the library refuses as everything else is answered."""
        self._send(HTTPStatus(code), "text/plain; charset=utf-8", HTTPStatus(code).phrase.encode())

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, act: Callable[[str], tuple[str, bytes]]) -> None:
        try:
            path = self._checked_path()
            self.server.last_asked = time.monotonic()
            kind, content = act(path)
            status = HTTPStatus.OK
        except _RefusedError as refused:
            status, kind, content = refused.status, "text/plain; charset=utf-8", str(refused).encode()
        except IndexError:
            status, kind, content = HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"There is no such thing."
        except SemiSAMError as error:
            status, kind, content = HTTPStatus.CONFLICT, "text/plain; charset=utf-8", str(error).encode()
        except OSError as error:
            says = f"The site's storage cannot be used ({error.strerror})."
            status, kind, content = HTTPStatus.INSUFFICIENT_STORAGE, "text/plain; charset=utf-8", says.encode()
        except Exception:
            logger.exception("A request of the page failed")
            status, kind, content = (
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "text/plain; charset=utf-8",
                b"It failed; see the log.",
            )
        self._send(status, kind, content)

    def _checked_path(self) -> str:
        """Return the path below the token, if everything about the request is as the page's own requests are."""
        if self.headers.get_all("Host") != [f"{LOOPBACK}:{self.server.server_port}"]:
            raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "Another host was asked for.")
        origins = self.headers.get_all("Origin") or []
        if any(origin != self.server.origin for origin in origins) or (self.command == "POST" and not origins):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Only the page itself may ask.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Only the page itself may ask.")
        empty, token, *rest = self.path.split("/") if self.path.isascii() else ["", ""]
        if empty or not hmac.compare_digest(token, self.server.token) or not rest or urlsplit(self.path).query:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "There is no such page.")
        return "/".join(rest)

    def _get(self, path: str) -> tuple[str, bytes]:
        if path in FILES:
            name, kind = FILES[path]
            return kind, (PAGE / name).read_bytes()
        if path == "worklist":
            return _json(self.server.desk.worklist())
        number, what, axis, slice_number = self._scan(path)
        if what is None:
            return _json(self.server.desk.scan(number))
        if what == "/mask":
            return "application/octet-stream", self.server.desk.mask(number)
        if axis is not None and slice_number is not None:
            return "application/octet-stream", self.server.desk.image_slice(number, int(axis), int(slice_number))
        raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "This is for POST.")

    def _post(self, path: str) -> tuple[str, bytes]:
        body = self._body()
        if path == "end":
            threading.Thread(target=self.server.shutdown, daemon=True).start()
            return _json({"ended": True})
        number, what, *_ = self._scan(path)
        if what == "/review":
            return _json(self.server.desk.keep(number, body))
        if what == "/hand-over":
            return _json(self.server.desk.hand_over(number))
        raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "This is for GET.")

    def _scan(self, path: str) -> tuple[int, str | None, str | None, str | None]:
        found = _SCAN.fullmatch(path)
        if found is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "There is no such page.")
        return int(found[1]), found[2], found[3], found[4]

    def _body(self) -> bytes:
        if self.headers.get("Content-Type") != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is expected.")
        lengths = self.headers.get_all("Content-Length") or []
        if (
            self.headers.get("Transfer-Encoding")
            or len(lengths) != 1
            or re.fullmatch(r"[0-9]{1,12}", lengths[0]) is None
        ):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "One Content-Length is expected.")
        length = int(lengths[0])
        if length > MOST_BODY:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {MOST_BODY >> 20} MB are accepted.")
        body = self.rfile.read(length)
        if len(body) < length:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "The request ended early.")
        return body

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _json(content: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(content, allow_nan=False).encode()
