"""The scans that a model is asked about: found by the layouts of the intake, read into memory one at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from intake.candidates import Candidate, Listing, Wishes
from intake.conversion import on_one_grid, read_source, series_of
from intake.dicom.series import DicomSeries
from intake.files import detached, volume_suffix
from intake.guards import LIMITS
from intake.layouts import layout_of
from intake.volume import IntakeError
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import Scan, prepare_image
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback

Pattern = re.Pattern[str]
_MODALITIES = {"ct": "CT", "mr": "MR", "mri": "MR", "pet": "PT", "pt": "PT"}


@dataclass(frozen=True)
class Input:
    """One scan to segment.

    Attributes:
        name: for its outputs; from the file or folder, so it may identify a patient.
        candidate: its files.
    """

    name: str
    candidate: Candidate

    @cached_property
    def series(self) -> DicomSeries | None:
        """The DICOM series of the first channel, or None for other files."""
        first = self.candidate.channels[0]
        return series_of(first) if first.kind == "dicom" else None

    @property
    def nifti(self) -> Path | None:
        """The NIfTI file of the first channel, whose header outputs take over; None for other formats."""
        path = Path(self.candidate.channels[0].paths[0])
        return path if (volume_suffix(path.name) or "").lower().startswith(".nii") else None

    @cached_property
    def sha256(self) -> str:
        """Hash of the content of all its image files: of all their hashes, channel by channel, in their order."""
        digest = hashlib.sha256()
        for source in self.candidate.channels:
            for path in source.paths:
                for each in (Path(path), *detached(Path(path))):
                    with each.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
            digest.update(f"|{source.channel}".encode())
        return digest.hexdigest()

    def read(
        self, spacing_mm: tuple[float, float, float] | None, memory_gb: float | None = None
    ) -> tuple[NDArray[np.float32], Geometry, list[str]]:
        """Return the channels (C, X, Y, Z), where they lie, and notes.

        Args:
            spacing_mm: voxel size, for h5 files.
            memory_gb: the largest image to load, all channels; judged by the header. None for the readers' own limit.

        Raises:
            IntakeError: a file cannot be read, or is too large.
        """
        sources, limits = self.candidate.channels, LIMITS
        if memory_gb is not None:
            limits = replace(LIMITS, voxels=min(LIMITS.voxels, int(memory_gb * 1e9 / (4 * len(sources)))))
        volumes, moved = on_one_grid([read_source(each, spacing_mm, limits) for each in sources])
        notes = list(dict.fromkeys(note for each in volumes for note in each.notes))
        return np.stack([each.voxels for each in volumes]), volumes[0].geometry, [*notes, *moved]


def find_inputs(
    source: Path, plan: Plan, layout: str, channels: dict[str, Pattern], progress: ProgressCallback | None = None
) -> tuple[list[Input], Listing]:
    """Return the scans of a file or folder that the plan's models can be asked about.

    Args:
        source: a volume file, a DICOM folder, a folder of scans, or a dataset.
        plan: how many channels a scan has.
        layout: as for `semisam import`.
        channels: channel name -> pattern of its series' description or file name.
        progress: called with (files looked at, files).

    Raises:
        IntakeError: there is nothing, or several channels are needed and not named.
    """
    names, found = plan.task.channels, layout_of(source, layout)
    by_number = not channels and found.NAME not in ("dicom", "bids")  # files end in _0000, _0001, ...
    if set(channels) != set(names) and (channels or (len(names) > 1 and not by_number)):
        raise IntakeError(f"the model has the channels {', '.join(names)}; name each by --channel <name>=<pattern>.")
    asked = {name: channels.get(name) for name in names} if len(names) > 1 or channels else {}
    listing = found.find(source, Wishes(channels=asked), progress)
    if not channels:
        listing = _of_the_modality(listing, names[0])
    return [
        Input(name, each) for name, each in zip(_names(listing.candidates), listing.candidates, strict=True)
    ], listing


def prepared(stack: NDArray[np.float32], grid: Geometry, name: str, plan: Plan) -> Scan:
    """Return a scan as a model of this plan sees it; NaN in `stack` may be set to 0.

    Raises:
        CaseError: it has voxels that are not finite.
    """
    return prepare_image(name, stack, grid, plan.data)


def _of_the_modality(listing: Listing, channel: str) -> Listing:
    """Leave out DICOM series of another modality than the model's channel has in its name, such as `lge-mr`."""
    expected = {_MODALITIES[part] for part in re.split(r"[^a-z]+", channel.lower()) if part in _MODALITIES}
    if len(expected) != 1:
        return listing
    fitting, left_out = [], []
    for each in listing.candidates:
        first = each.channels[0]
        if first.kind == "dicom" and first.modality and first.modality not in expected:
            reason = (
                f"it is {first.modality}; the model's channel is {channel} (--channel {channel}=<pattern> takes it)"
            )
            left_out.append((series_of(first).description or first.series, reason))
        else:
            fitting.append(each)
    return Listing(tuple(fitting), (*listing.left_out, *left_out))


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Return a file name for each, without suffix; equal ones get a part of the hash of what they stand for."""
    plain = []
    for each in candidates:
        first = each.channels[0]
        text = Path(first.paths[0]).parent.name if first.kind == "dicom" else each.scan
        plain.append(re.sub(r"[^\w.-]+", "-", text).strip(".-")[:80] or "scan")
    keys = [name.casefold().removesuffix("_uncertainty") for name in plain]  # of their files, on any file system
    return [
        name
        if keys.count(key) == 1
        else f"{name}-{hashlib.sha256(f'{each.patient}|{each.scan}'.encode()).hexdigest()[:8]}"
        for name, key, each in zip(plain, keys, candidates, strict=True)
    ]
