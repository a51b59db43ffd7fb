"""The scans that a model is asked about: found by the layouts of the intake, by names and headers alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from intake.candidates import Candidate, Listing, Wishes
from intake.conversion import series_of
from intake.dicom.series import DicomSeries
from intake.files import detached, volume_suffix
from intake.layouts import layout_of
from intake.volume import IntakeError
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import Scan, prepare_image
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback

Pattern = re.Pattern[str]
_MODALITIES = {"ct": "CT", "mr": "MR", "mri": "MR", "pet": "PT", "pt": "PT"}
MAPS = ("uncertainty", "disagreement")  # of a scan, in files of its name and `_<map>`


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


def maps_of(models: int) -> tuple[str, ...]:
    """Return the maps of uncertainty that so many models give."""
    return MAPS if models > 1 else MAPS[:1]


def find_inputs(
    source: Path, plan: Plan, layout: str, channels: dict[str, Pattern], progress: ProgressCallback | None = None
) -> tuple[list[Input], Listing]:
    """Return the scans of a file or folder that the plan's models can be asked about.

    Args:
        source: a volume file, a multi-frame DICOM file, a DICOM folder, a folder of scans, or a dataset.
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
    names_of = _names(listing.candidates, alone=source.is_file())
    return [Input(name, each) for name, each in zip(names_of, listing.candidates, strict=True)], listing


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


def _names(candidates: Sequence[Candidate], alone: bool) -> list[str]:
    """Return a file name for each, without suffix; equal ones get a part of the hash of what they stand for.

    A DICOM series is called like its folder, or like its file if that was named `alone`.
    """
    plain = []
    for each in candidates:
        first = each.channels[0]
        path = Path(first.paths[0])
        file = re.sub(r"\.dcm$", "", path.name, flags=re.IGNORECASE)
        text = each.scan if first.kind != "dicom" else file if alone else path.parent.name
        plain.append(re.sub(r"[^\w.-]+", "-", text).strip(".-")[:80] or "scan")
    keys = [re.sub(rf"_({'|'.join(MAPS)})$", "", name.casefold()) for name in plain]  # on any file system
    return [
        name
        if keys.count(key) == 1
        else f"{name}-{hashlib.sha256(f'{each.patient}|{each.scan}'.encode()).hexdigest()[:8]}"
        for name, key, each in zip(plain, keys, candidates, strict=True)
    ]
