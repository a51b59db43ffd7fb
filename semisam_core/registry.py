"""How a part is added to a registry, in this process, without editing the registry's own file."""

from __future__ import annotations

from typing import TypeVar

Entry = TypeVar("Entry")


def add_entry(entries: dict[str, Entry], what: str, name: str, entry: Entry) -> None:
    """Add an entry under its name; adding the same one again changes nothing.

    Args:
        entries: the registry, changed in place.
        what: what its entries are, for the message.
        name: as plans call it.
        entry: the part.

    Raises:
        ValueError: another entry has the name.
    """
    if entries.setdefault(name, entry) is not entry:
        raise ValueError(f"a {what} named {name} is already registered; choose another name")
