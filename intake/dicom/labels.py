"""Read experts' labels from DICOM SEG and RTSTRUCT, onto the grid of the series that they were drawn on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from intake.dicom.headers import Metered, numbers
from intake.dicom.series import LPS_TO_RAS, DicomSeries, grid_of, onto_straight
from intake.guards import LIMITS, Limits, check_file, shown
from intake.volume import IntakeError, LabelVolume, Volume
from semisam_core.data.geometry import Geometry

MOST_SEGMENTS = 1000
_NAMES = ("SegmentSequence", "StructureSetROISequence")
OFF_SLICE = 0.5  # a contour further from the nearest slice than this share of the slice distance is left out
_ALIGNED_VOXELS = 0.01


def segment_names(path: Path, limits: Limits = LIMITS) -> dict[int, str]:
    """Return number -> name of a SEG's segments or an RTSTRUCT's regions of interest, which may have the number 0.

    Raises:
        IntakeError: the file is neither, or damaged.
    """
    check_file(path, limits)
    try:
        with Metered(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_NAMES))
        segments = header.get("SegmentSequence")
        if segments is None:
            pairs = [(int(each.ROINumber), each.get("ROIName")) for each in header.StructureSetROISequence]
        else:
            pairs = [(int(each.SegmentNumber), each.get("SegmentLabel")) for each in segments]
    except IntakeError as error:
        raise IntakeError(f"{path.name!a}: {error}.") from None
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds for damaged files
        raise IntakeError(f"{path.name!a}: its segments cannot be listed ({type(error).__name__}).") from None
    if len(pairs) > MOST_SEGMENTS:
        raise IntakeError(f"{path.name!a}: it has {len(pairs)} segments; at most {MOST_SEGMENTS} are read.")
    return {number: shown(name or f"segment {number}", 64).strip() for number, name in pairs}


def read_label(
    path: Path, modality: str, series: DicomSeries, wanted: Collection[str] | None = None, limits: Limits = LIMITS
) -> LabelVolume:
    """Read a label file onto its series' grid.

    Args:
        path: the file.
        modality: SEG or RTSTRUCT.
        series: what it was drawn on.
        wanted: names of the segments to read, in any case; None for all. Others may overlap these (an RTSTRUCT often
            has the body's outline).
        limits: largest file and volume.

    Raises:
        IntakeError: the file is damaged, does not lie on the series, lacks all wanted segments, or two wanted segments
            overlap.
    """
    names = segment_names(path, limits)
    folded = None if wanted is None else {name.casefold() for name in wanted}
    chosen = {number: name for number, name in names.items() if folded is None or name.casefold() in folded}
    if not chosen:
        raise IntakeError(f"{path.name!a}: it has the segments {', '.join(names.values()) or 'none'}; none is wanted.")
    grid = grid_of(series, limits)
    notes: list[str] = []
    masks = _seg(path, chosen, grid) if modality == "SEG" else _rtstruct(path, chosen, series, grid, notes)
    label = np.zeros(grid.shape, dtype=np.uint16)
    values = _values(chosen)
    named = {value: chosen[number] for number, value in values.items()}
    for number, mask in masks:
        if bool((taken := label[mask]).any()):
            other = named[int(taken[taken > 0][0])]
            raise IntakeError(
                f"{path.name!a}: the segments {chosen[number]} and {other} overlap, and a voxel can have one class. "
                "Name the segments to use, or redraw them."
            )
        label[mask] = values[number]
    return LabelVolume(Volume(label, grid, tuple(notes)), named)


def _values(numbers_: Collection[int]) -> dict[int, int]:
    """Return a value of the label map for each segment: its number, unless the format's 1 to 65535 does not hold it."""
    free = iter(sorted(set(range(1, MOST_SEGMENTS + 1)) - set(numbers_)))
    return {number: number if 0 < number < 65536 else next(free) for number in numbers_}


def _seg(path: Path, chosen: Collection[int], grid: Geometry) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the mask of each segment: all of a file with many would not fit in memory."""
    try:
        segmentation = hd.seg.segread(path)
        lps = (LPS_TO_RAS @ grid.affine.numpy())[:, [2, 1, 0, 3]]  # of (slice, row, column)
        target = hd.VolumeGeometry(lps, grid.shape[::-1], coordinate_system="PATIENT")
        for number in chosen:
            found = segmentation.get_volume(segment_numbers=[number])
            array = found.squeeze_channel().match_geometry(target, tol=_ALIGNED_VOXELS).array
            yield number, np.ascontiguousarray(np.asarray(array).transpose(2, 1, 0)) > 0.5
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - highdicom raises many kinds
        raise IntakeError(
            f"{path.name!a}: the segmentation does not lie on the voxels of its series, or is damaged "
            f"({type(error).__name__}: {shown(error)})."
        ) from None


def _rtstruct(
    path: Path, chosen: Collection[int], series: DicomSeries, grid: Geometry, notes: list[str]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the mask of each region of interest, and note what was left out."""
    stack = None if series.slices[0].frames > 1 else series.stack
    shape, affine = (grid.shape, grid.affine.numpy()) if stack is None else (stack.shape, stack.affine)
    to_voxels = np.linalg.inv(affine) @ LPS_TO_RAS
    off, some = 0, False
    try:
        regions = list(pydicom.dcmread(path).ROIContourSequence)
        for number in chosen:
            mask = np.zeros(shape, dtype=bool)
            for region in regions:
                if int(region.ReferencedROINumber) == number:
                    off += sum(not _fill(mask, each, to_voxels) for each in region.get("ContourSequence") or ())
            some = some or bool(mask.any())
            yield number, mask if stack is None else onto_straight(mask.astype(np.uint8), stack, 0, 0) > 0
    except (AttributeError, ValueError, TypeError) as error:
        raise IntakeError(f"{path.name!a}: its contours are damaged ({type(error).__name__}).") from None
    if not some:
        raise IntakeError(f"{path.name!a}: none of its contours lies on the series.")
    if off:
        notes.append(f"{off} contours lie on no slice of the series and were left out")


def _fill(mask: NDArray[np.bool_], contour: Any, to_voxels: NDArray[np.float64]) -> bool:
    """Draw one contour into its slice; an inner contour cuts a hole. Return whether it lies on a slice."""
    if str(contour.get("ContourGeometricType", "CLOSED_PLANAR")) not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        return False
    values = contour.get("ContourData")
    count = len(values) if values is not None else 0
    flat = numbers(contour, "ContourData", count)
    if flat is None or count < 9 or count % 3:
        return False
    points = np.c_[flat.reshape(-1, 3), np.ones(count // 3)] @ to_voxels.T
    depth = points[:, 2].mean()
    slice_index = round(float(depth)) if np.isfinite(depth) else -1
    if not 0 <= slice_index < mask.shape[2] or np.abs(points[:, 2] - slice_index).max() > OFF_SLICE:
        return False
    mask[:, :, slice_index] ^= polygon2mask(mask.shape[:2], points[:, :2])  # type: ignore[no-untyped-call]
    return True
