"""Text from elsewhere, such as file names, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with every character escaped that could control a terminal or reorder what is shown."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
