"""The layouts that scans come in. Each tells whether a folder has it, and lists the folder's scans.

A new layout is a file with `NAME`, `recognises(source)` and `find(source, wishes, progress)`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from intake.candidates import Listing, Wishes
from intake.layouts import bids, decathlon, dicom, h5, nnunet, paired
from intake.volume import IntakeError

Progress = Callable[[int, int], None]


class Layout(Protocol):
    """A way to arrange scans in folders."""

    NAME: str

    def recognises(self, source: Path) -> bool:
        """Return whether a folder or file is arranged this way, by names alone."""

    def find(self, source: Path, wishes: Wishes, progress: Progress | None = None) -> Listing:
        """List the scans."""


LAYOUTS: dict[str, Layout] = {each.NAME: each for each in (decathlon, nnunet, bids, h5, paired, dicom)}
"""By name, in the order in which they are tried: DICOM files have no agreed names, so they come last."""


def layout_of(source: Path, name: str) -> Layout:
    """Return the layout of this name, or with `auto` the first that recognises the source.

    Raises:
        IntakeError: there is no such layout, or nothing is there.
    """
    if not source.exists():
        raise IntakeError(f"{source}: there is no such file or folder.")
    if name == "auto":
        return next(each for each in LAYOUTS.values() if each.recognises(source))
    if name not in LAYOUTS:
        raise IntakeError(f"--layout {name}: accepted are auto, {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]
