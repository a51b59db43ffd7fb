"""Further sources of evidence by name: those for which the plan's `sources` section has no key of their own.

A new one is a module with a class and a line in `SOURCES`, or a call of `register_source` in a process of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from semisam_core.registry import add_entry
from semisam_core.sources.base import LabeledScan, Source

SourceBuilder = Callable[[Sequence[LabeledScan]], Source]
"""Builds a source for one round from the site's labeled scans, of which there may be none."""

SOURCES: dict[str, SourceBuilder] = {}


def register_source(name: str, build: SourceBuilder) -> None:
    """Add a source to the registry of this process.

    Raises:
        ValueError: another source has the name.
    """
    add_entry(SOURCES, "source", name, build)


def source_builder(name: str) -> SourceBuilder:
    """Return what builds the source of this name.

    Raises:
        ValueError: there is none; the message lists the accepted names.
    """
    if name not in SOURCES:
        raise ValueError(f"there is no further source {name!r}; accepted: {', '.join(SOURCES) or 'none'}")
    return SOURCES[name]
