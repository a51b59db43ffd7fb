"""What a layout finds in a folder: scans that could be taken, each as files to read, before any voxel is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from semisam_core.configuration import StrictModel


class Source(StrictModel):
    """The files of one channel or label, and how to read them.

    Attributes:
        kind: a volume `file`, the slices of a `dicom` series, an `h5` release, or a `dicom-label`.
        paths: one, or for `dicom` one per slice.
        channel: which channel of a 4D file.
        modality: such as CT; empty where the format does not say. SEG or RTSTRUCT for labels.
        series: the series' UID, or the path within the source; identifying.
        names: value -> name of the label's structures, where the layout has them.
    """

    kind: Literal["file", "dicom", "h5", "dicom-label"]
    paths: tuple[str, ...] = Field(min_length=1)
    channel: int | None = None
    modality: str = ""
    series: str
    names: dict[int, str] = Field(default_factory=dict)


class Candidate(StrictModel):
    """One scan that could be taken. Identifying: it stays in memory and in the site's private records.

    Attributes:
        patient: the patient's ID, or what stands for it.
        scan: what tells the scan from the patient's others.
        channels: in the plan's order.
        label: the expert's label, if there is one.
        notes: sentences for the hospital.
    """

    patient: str
    scan: str
    channels: tuple[Source, ...]
    label: Source | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a folder holds: candidates, and what was left out with the reason."""

    candidates: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Wishes:
    """What the person who imports has said.

    Attributes:
        labels: folder or file of labels, if they are not where the layout has them.
        channels: channel name -> pattern (regular expression) of the series description or file name.
        patient_pattern: regular expression whose first group, in a file's name, is the patient; the whole name if None.
        wanted: names of the classes that labels may have, or None for all.
    """

    labels: Path | None = None
    channels: dict[str, Any] = field(default_factory=dict)
    patient_pattern: Any = None
    wanted: tuple[str, ...] | None = None

    def patient_of(self, name: str) -> str:
        """Return the patient that a file's name stands for."""
        if self.patient_pattern is not None and (match := self.patient_pattern.search(name)):
            return str(match[1] if match.re.groups else match[0])
        return name
