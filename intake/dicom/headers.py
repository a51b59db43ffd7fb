"""What is read of a DICOM file before any pixel: whether it is an image, of which series, and where it lies."""

from __future__ import annotations

import io
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError

from intake.guards import LIMITS, Limits, check_file, inside, shown
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
HEADER_BYTES = 256 << 20  # an RTSTRUCT of hundreds of regions has 100 MB
HEADER_SECONDS = 60.0
FARTHEST_MM = 1e6
_GREYSCALE = ("", "MONOCHROME1", "MONOCHROME2")


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
        return int(number(self.header, "NumberOfFrames") or 1)

    def text(self, keyword: str) -> str:
        """Return a tag's value as one printable line."""
        return text(self.header, keyword)


class Metered(io.BufferedReader):
    """A file that gives a bounded number of bytes for a bounded time, also where pydicom inflates them.

    Reading more raises an `IntakeError`.
    """

    def __init__(self, path: Path, most: int = HEADER_BYTES, seconds: float = HEADER_SECONDS) -> None:
        super().__init__(io.FileIO(path))
        self._left, self._until, self._most = most, time.monotonic() + seconds, most

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most `size` bytes; all that are left if it is negative, which pydicom reads to inflate them."""
        everything = size is None or size < 0
        found = super().read(self._left + 1 if everything else min(size or 0, self._left + 1))
        self._left -= len(found)
        if self._left < 0 or time.monotonic() > self._until or (everything and self._inflates_beyond(found)):
            raise IntakeError(f"a header of more than {self._most >> 20} MB, or one that takes too long to read")
        return found

    def _inflates_beyond(self, packed: bytes) -> bool:
        stream, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, packed
        while rest and not stream.eof and size <= self._most:
            size += len(stream.decompress(rest, 1 << 20))
            rest = stream.unconsumed_tail
        return size > self._most


def files_below(folder: Path, unreadable: Callable[[Path, str], None] | None = None) -> Iterator[Path]:
    """Yield every file below a folder, sorted, or the file itself; links to folders are not followed.

    Args:
        folder: where to look.
        unreadable: called with a folder that cannot be listed, and why.
    """

    def tell(error: OSError) -> None:
        if unreadable is not None:
            unreadable(Path(error.filename), f"a folder that cannot be listed ({error.strerror})")

    if folder.is_file():
        yield folder
        return
    for root, names, files in os.walk(folder, onerror=tell):
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
        with Metered(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    except IntakeError:
        raise
    except InvalidDicomError:
        raise IntakeError("no DICOM file") from None
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds for damaged files
        if isinstance(error, OSError) and error.strerror:
            raise IntakeError(f"a file that cannot be read ({error.strerror})") from None
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
    if (number(header, "SamplesPerPixel") or 1) != 1 or text(header, "PhotometricInterpretation") not in _GREYSCALE:
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
    if max(np.abs(position).max(), spacing.max()) > FARTHEST_MM:
        raise IntakeError("with a position or voxel size beyond any scanner")
    row, column = orientation[:3], orientation[3:]
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise IntakeError("with directions that are no right angle")
    return Slice(path, header, position, orientation)


def text(header: Any, keyword: str) -> str:
    """Return a tag's value as one printable line; empty if it is missing or damaged."""
    try:
        return shown(header.get(keyword, "") or "").strip()
    except Exception:  # noqa: BLE001 - pydicom converts values when they are asked for, and raises many kinds
        return ""


def number(header: Any, keyword: str) -> float | None:
    """Return a tag's only number, or None."""
    found = numbers(header, keyword, 1)
    return None if found is None else float(found[0])


def numbers(header: Any, keyword: str, count: int) -> NDArray[np.float64] | None:
    """Return a tag's numbers; None if there are not so many, or they are not finite."""
    try:
        found = np.array([float(value) for value in _several(header.get(keyword))], dtype=np.float64)
    except Exception:  # noqa: BLE001 - as above
        return None
    return found if len(found) == count and bool(np.isfinite(found).all()) else None


def _several(value: Any) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    return list(value) if isinstance(value, list | tuple | pydicom.multival.MultiValue) else (value,)
