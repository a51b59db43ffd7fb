"""Finds a text in captured bytes, however it may be encoded or compressed."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Sequence

LARGEST_STREAM = 64 * 2**20
DEEPEST = 3
PIECE = 32  # bytes that are lost before the place where a stream is damaged
ZIP_ENTRY = b"PK\x03\x04"
GZIP = b"\x1f\x8b\x08"


def encodings_of(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield what a text looks like in bytes, by the encoding's name.

    Base64 depends on where in a longer text it begins; only the characters that do not depend on what is around are
    kept.
    """
    plain = {name: text.encode(name) for name in ("utf-8", "utf-16-le", "utf-16-be")}
    for name, content in plain.items():
        yield name, content
        yield f"{name}, hex", content.hex().encode()
        yield f"{name}, HEX", content.hex().upper().encode()
        for shift in range(3):
            code = base64.b64encode(bytes(shift) + content)
            begin = (0, 2, 3)[shift]  # characters that hold a bit of what comes before
            spoilt = (3 - (shift + len(content)) % 3) % 3
            end = len(code) - (0, 2, 3)[spoilt]
            yield f"{name}, base64 +{shift}", code[begin:end]
            yield f"{name}, urlsafe base64 +{shift}", code[begin:end].replace(b"+", b"-").replace(b"/", b"_")


def found_in(content: bytes, text: str) -> list[str]:
    """Return the names of the encodings in which a text is in these bytes, also inside compressed streams."""
    return found_among([("", content), *streams_in(content)], text)


def found_among(streams: Sequence[tuple[str, bytes]], text: str) -> list[str]:
    """Return the names of the encodings in which a text is in one of these streams, each given with its place."""
    found: dict[str, None] = {}
    for name, code in encodings_of(text):
        anyhow = "base64" not in name and "HEX" not in name
        for place, stream in streams:
            if code in stream or (anyhow and code.lower() in stream.lower()):
                found[f"{place}{name}"] = None
    return list(found)


def streams_in(content: bytes, deep: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield what is compressed in these bytes, also within each other: zlib, gzip and zip, wherever it begins."""
    if deep >= DEEPEST:
        return
    for name, window, at in _beginnings(content):
        if inflated := _inflated(content, window, at):
            yield f"{name} > ", inflated
            for inner, stream in streams_in(inflated, deep + 1):
                yield f"{name} > {inner}", stream


def _beginnings(content: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield kind, zlib's window bits and offset of whatever looks like the beginning of a stream."""
    at = content.find(GZIP)
    while at >= 0:
        yield "gzip", 31, at
        at = content.find(GZIP, at + 1)
    at = content.find(ZIP_ENTRY)
    while at >= 0:
        if len(content) >= at + 30:
            name, extra = struct.unpack_from("<HH", content, at + 26)
            yield "zip", -15, at + 30 + name + extra
        at = content.find(ZIP_ENTRY, at + 1)
    for first in range(0x08, 0x79, 0x10):  # deflate with a window of 256 bytes to 32 kB
        at = content.find(first)
        while 0 <= at < len(content) - 1:
            if (256 * first + content[at + 1]) % 31 == 0:
                yield "zlib", 15, at
            at = content.find(first, at + 1)


def _inflated(content: bytes, window: int, at: int) -> bytes:
    """Return what can be inflated of a stream, up to where it ends, is cut or damaged."""
    stream, pieces, size = zlib.decompressobj(window), list[bytes](), 0
    view = memoryview(content)
    try:
        while at < len(content) and not stream.eof and size < LARGEST_STREAM:
            pieces.append(stream.decompress(view[at : at + PIECE]))
            size, at = size + len(pieces[-1]), at + PIECE
    except zlib.error:
        pass
    return b"".join(pieces)
