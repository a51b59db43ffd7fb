"""What is read of a DICOM file before any pixel: whether it is an image, of which series, and where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from intake.guards import LIMITS, Limits, check_deflated, check_file, inside, shown
from intake.volume import IntakeError

_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("PatientID", "PatientName", "Modality", "SeriesDescription", "SeriesNumber", "ImageType", "InstanceNumber"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SharedFunctionalGroupsSequence"),
    *("TemporalPositionIdentifier", "AcquisitionNumber", "EchoTime", "DiffusionBValue", "TriggerTime"),
    *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence", "InversionTime", "FlipAngle"),
]
SPLITTERS = (
    *("TemporalPositionIdentifier", "EchoTime", "InversionTime", "FlipAngle", "DiffusionBValue", "TriggerTime"),
    "AcquisitionNumber",
)
LABEL_MODALITIES = ("SEG", "RTSTRUCT")
DEFLATED_BYTES = 1 << 30  # that a deflated file may have: pydicom inflates it whole, even to read its header
_PREAMBLE = 144  # bytes before the elements that the group length of the file's meta information counts


@dataclass(frozen=True, eq=False)
class Slice:
    """One image file of a series.

    Attributes:
        path: where it is.
        header: the tags that were read; identifying, stays in memory.
        position: (3,) of the first voxel's centre, mm, LPS; None for multi-frame files, whose frames carry their own.
        orientation: (6,) direction cosines along a row and along a column, or None likewise.
    """

    path: Path
    header: Any
    position: NDArray[np.float64] | None
    orientation: NDArray[np.float64] | None

    @property
    def frames(self) -> int:
        """Number of frames."""
        return int(self.header.get("NumberOfFrames") or 1)

    def text(self, keyword: str) -> str:
        """Return a tag's value as one printable line."""
        return shown(self.header.get(keyword, "") or "").strip()


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, sorted, or the file itself; links to folders are not followed."""
    if folder.is_file():
        yield folder
    for root, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            yield Path(root, name)


def read_header(root: Path, path: Path, limits: Limits = LIMITS) -> Any:
    """Return a DICOM file's tags that matter here.

    Raises:
        IntakeError: it is no DICOM file, or a file that may not be read.
    """
    check_file(inside(root, path), limits)
    try:
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            check_deflated(path, _PREAMBLE + int(meta.FileMetaInformationGroupLength), DEFLATED_BYTES)
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        header.get("Modality"), header.get("SeriesInstanceUID")
    except IntakeError:
        raise
    except InvalidDicomError:
        raise IntakeError("no DICOM file") from None
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds for damaged files
        raise IntakeError(f"a damaged DICOM file ({type(error).__name__})") from None
    if path.name.upper() == "DICOMDIR":
        raise IntakeError("an index of other files")
    return header


def image_slice(path: Path, header: Any) -> Slice:
    """Return an image file's place.

    Raises:
        IntakeError: it is no image of a volume: in colour, without pixels, a localizer, or without a position.
    """
    rows, columns = number(header, "Rows"), number(header, "Columns")
    if not rows or not columns:
        raise IntakeError("no image (a report, a presentation state, or a raw file)")
    if (number(header, "SamplesPerPixel") or 1) != 1:
        raise IntakeError("in colour (a screenshot or a fused display)")
    kinds = [str(kind).upper() for kind in _several(header.get("ImageType"))]
    if "LOCALIZER" in kinds:
        raise IntakeError("a localizer")
    if (number(header, "NumberOfFrames") or 1) > 1:
        return Slice(path, header, None, None)
    position, orientation = numbers(header, "ImagePositionPatient", 3), numbers(header, "ImageOrientationPatient", 6)
    spacing = numbers(header, "PixelSpacing", 2)
    if position is None or orientation is None or spacing is None or min(spacing) <= 0:
        raise IntakeError("without position, orientation or voxel size (a screenshot or a projection)")
    row, column = orientation[:3], orientation[3:]
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise IntakeError("with directions that are no right angle")
    return Slice(path, header, position, orientation)


def number(header: Any, keyword: str) -> float | None:
    """Return a tag's only number, or None."""
    found = numbers(header, keyword, 1)
    return None if found is None else float(found[0])


def numbers(header: Any, keyword: str, count: int) -> NDArray[np.float64] | None:
    """Return a tag's numbers; None if there are not so many, or they are not finite."""
    try:
        found = np.array([float(value) for value in _several(header.get(keyword))], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == count and bool(np.isfinite(found).all()) else None


def _several(value: Any) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    return list(value) if isinstance(value, list | tuple | pydicom.multival.MultiValue) else (value,)
