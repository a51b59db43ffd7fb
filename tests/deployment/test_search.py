"""The search that the wire test relies on finds a text in every encoding that it claims to know."""

from __future__ import annotations

import base64
import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.deployment.search import found_in

NAME = "Quackenbush^Zoë"


def _zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.py", content)
    return file.getvalue()


def _deflated(content: bytes, window: int = 15, level: int = 6) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, window)
    return stream.compress(content) + stream.flush()


WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "as it is": bytes,
    "hex": lambda content: content.hex().encode(),
    "HEX": lambda content: content.hex().upper().encode(),
    "base64": base64.b64encode,
    "base64, one byte in": lambda content: base64.b64encode(b"x" + content + b"y"),
    "base64, two bytes in": lambda content: base64.b64encode(b"xy" + content),
    "urlsafe base64": lambda content: base64.urlsafe_b64encode(b"\xff\xfe" + content + b"\xff"),
    "zlib": lambda content: _deflated(b"before" + content),
    "zlib, stored": lambda content: _deflated(content, level=0),
    "zlib, small window": lambda content: _deflated(content, window=9),
    "zlib, cut": lambda content: _deflated(content + os.urandom(5000))[:-100],
    "zlib, damaged": lambda content: _deflated(content + os.urandom(5000))[:-2000] + bytes(2000),
    "gzip": lambda content: gzip.compress(b"before" + content),
    "zip": _zipped,
    "gzip in zlib": lambda content: _deflated(gzip.compress(content)),
    "base64 in gzip": lambda content: gzip.compress(base64.b64encode(b"x" + content)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_planted_text_is_found(wrapping: str, encoding: str) -> None:
    planted = WRAPPED[wrapping](NAME.encode(encoding))
    noise = os.urandom(3001)
    assert found_in(noise + planted + noise, NAME)
    assert found_in(planted, NAME)
    assert not found_in(noise + WRAPPED[wrapping]("Quackenbosh^Zoë".encode(encoding)) + noise, NAME)


@pytest.mark.parametrize("changed", [str.upper, str.lower])
def test_a_planted_text_is_found_in_another_case(changed: Callable[[str], str]) -> None:
    assert found_in(changed("Quackenbush").encode(), "Quackenbush")


@given(st.binary(max_size=300), st.text(min_size=6, max_size=40), st.binary(max_size=300))
def test_any_text_is_found_at_any_offset_of_base64(before: bytes, text: str, after: bytes) -> None:
    assert found_in(base64.b64encode(before + text.encode() + after), text)


@given(st.binary(max_size=2000))
def test_noise_holds_no_long_text(noise: bytes) -> None:
    assert not found_in(noise, NAME)
