"""What the page asks for: the worklist, one scan at a time, and keeping a review. Knows nothing of HTTP."""

from __future__ import annotations

import base64
import binascii
import shutil
import threading
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from client.reviews import LONGEST_MINUTES
from review.codec import CodecError, decode, encode
from review.hand_over import MASK, exchange_folder, hand_over, take_back
from review.masks import Mask
from review.reviewing import Opened, ReviewError, Reviewing
from review.view import AXES, View
from review.worklist import WorklistEntry
from semisam_core.configuration import StrictModel


class Submission(StrictModel):
    """A review as the page sends it.

    Attributes:
        ratings: class -> 1 to 4.
        minutes: how long it took.
        mask: the mask's runs in base64; None to keep the ratings alone.
        file: the mask was drawn by another program and is read from the exchange folder.
    """

    ratings: Annotated[dict[str, Annotated[int, Field(ge=1, le=4)]], Field(min_length=1, max_length=255)]
    minutes: Annotated[float, Field(ge=0, le=LONGEST_MINUTES)]
    mask: str | None = None
    file: Literal["nifti"] | None = None


@dataclass
class _OnDesk:
    opened: Opened
    view: View


class Desk:
    """One rater's desk: a worklist as it was when the command began, and one open scan.

    Args:
        reviewing: the rater at work.
        most: how many scans of the worklist to show.
    """

    def __init__(self, reviewing: Reviewing, most: int) -> None:
        self._reviewing = reviewing
        self._entries: list[WorklistEntry] = reviewing.worklist()[:most]
        self._done: dict[int, str] = {}
        self._on_desk: tuple[int, _OnDesk] | None = None
        self._lock = threading.Lock()

    def worklist(self) -> dict[str, Any]:
        """Return what the page lists."""
        with self._lock:
            scans = [
                {
                    "case": entry.case,
                    "doubt": round(entry.doubt, 3) if entry.classes else None,
                    "done": self._done.get(number),
                    "classes": [
                        {
                            "name": each.name,
                            "disagreement": round(each.disagreement, 3),
                            "implausibility": None if each.implausibility is None else round(each.implausibility, 3),
                            "volume_ml": round(each.volume_ml, 2),
                            "refused": each.refused,
                        }
                        for each in entry.classes
                    ],
                }
                for number, entry in enumerate(self._entries)
            ]
            about = {"rater": self._reviewing.rater, "run": self._reviewing.run, "second": self._reviewing.second}
            return about | {"classes": list(self._reviewing.plan.class_names), "scans": scans}

    def scan(self, number: int) -> dict[str, Any]:
        """Open a scan and return what the page needs to show it; its slices and mask are asked for apart.

        Raises:
            IndexError: the worklist has no such scan.
            SemiSAMError: it cannot be opened.
        """
        with self._lock:
            desk = self._open(number)
            view = desk.view
            return {
                "case": desk.opened.case.id,
                "shape": view.shape,
                "spacing_mm": view.spacing_mm,
                "lower": view.lower,
                "upper": view.upper,
                "windows": [[each.name, each.lower, each.upper] for each in view.windows],
                "axis": view.axis,
                "axes": AXES,
                "round": desk.opened.round,
                "refused": dict(desk.opened.refused),
            }

    def image_slice(self, number: int, axis: int, slice_number: int) -> bytes:
        """Return a slice of an open scan.

        Raises:
            IndexError: there is none.
            SemiSAMError: the scan cannot be opened.
        """
        with self._lock:
            view = self._open(number).view
        return view.image_slice(axis, slice_number)

    def mask(self, number: int) -> bytes:
        """Return the runs of the pseudo-label's mask.

        Raises:
            IndexError: the worklist has no such scan.
            SemiSAMError: it cannot be opened.
        """
        with self._lock:
            desk = self._open(number)
            return encode(desk.view.to_page(desk.opened.mask))

    def keep(self, number: int, content: bytes) -> dict[str, Any]:
        """Keep a review of an open scan, and return what became of the pseudo-label.

        Args:
            number: its place in the worklist.
            content: a `Submission` as JSON.

        Raises:
            IndexError: the worklist has no such scan.
            SemiSAMError: the review is malformed, contradicts itself, or does not fit the scan.
            OSError: the storage cannot be written.
        """
        try:
            said = Submission.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ReviewError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}.") from None
        with self._lock:
            desk = self._open(number)
            label: Mask | None = None
            if said.file is not None:
                folder = exchange_folder(self._reviewing.store, desk.opened)
                label = take_back(desk.opened, folder / MASK, self._reviewing.plan)
            elif said.mask is not None:
                label = self._decoded(desk, said.mask)
            tool: Literal["nifti", "page"] = "page" if said.file is None else "nifti"
            record = self._reviewing.keep(desk.opened, said.ratings, said.minutes, label, tool)
            self._done[number] = record.decision.value
            if said.file is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return {"decision": record.decision.value}

    def hand_over(self, number: int) -> dict[str, Any]:
        """Write an open scan and its pseudo-label for another program, and return where they lie.

        Raises:
            IndexError: the worklist has no such scan.
            SemiSAMError: it cannot be opened.
            OSError: the storage cannot be written.
        """
        with self._lock:
            desk = self._open(number)
            folder = exchange_folder(self._reviewing.store, desk.opened)
            files = hand_over(desk.opened, folder, self._reviewing.plan)
            return {"folder": str(folder), "files": [path.name for path in files]}

    def _decoded(self, desk: _OnDesk, mask: str) -> Mask:
        try:
            runs = base64.b64decode(mask, validate=True)
        except (binascii.Error, ValueError):
            raise CodecError("the mask is not base64.") from None
        classes = len(self._reviewing.plan.task.classes)
        return desk.view.from_page(decode(runs, desk.view.page_shape, classes))

    def _open(self, number: int) -> _OnDesk:
        if self._on_desk is not None and self._on_desk[0] == number:
            return self._on_desk[1]
        if not 0 <= number < len(self._entries):
            raise IndexError("the worklist has no such scan")
        self._on_desk = None  # so that two scans are never in memory
        opened = self._reviewing.open(self._entries[number].case)
        desk = _OnDesk(opened, View(opened.case, 0, self._reviewing.plan.data.intensity, opened.mask))
        self._on_desk = (number, desk)
        return desk
