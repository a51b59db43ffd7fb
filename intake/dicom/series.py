"""Find the series in a folder as exported from a PACS, and read each into one volume."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from intake.dicom.headers import (
    LABEL_MODALITIES,
    SPLITTERS,
    Slice,
    files_below,
    image_slice,
    numbers,
    read_header,
    text,
)
from intake.dicom.pixels import frames_grid, read_frames, read_slice
from intake.guards import LIMITS, Limits, Request, check_affine, check_shape, shown
from intake.volume import IntakeError, Volume
from semisam_core.data.geometry import Geometry
from semisam_core.data.nifti import SMALLEST_SIDE

SAME_PLACE_MM = 0.01
UNEVEN = 0.05  # largest deviation of a slice from even spacing, as a share of it, that is rounded away
GAP = 1.5  # slices further apart than this times the usual distance: one is missing
TILT_MM = 0.05  # drift between neighbouring slices, within their plane, from which the gantry counts as tilted
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """Image files that make up one volume, in the order of their slices.

    Attributes:
        slices: one per file.
        part: what tells it from other volumes of the same series, such as "EchoTime 2.3"; empty if it is the only one.
    """

    slices: tuple[Slice, ...]
    part: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in the order of slices."""
        return tuple(each.path for each in self.slices)

    @property
    def patient(self) -> str:
        """The patient's ID; identifying."""
        return self._first.text("PatientID")

    @property
    def modality(self) -> str:
        """Such as CT or MR."""
        return self._first.text("Modality")

    @property
    def uid(self) -> str:
        """The series instance UID."""
        return self._first.text("SeriesInstanceUID")

    @property
    def study_uid(self) -> str:
        """The study instance UID."""
        return self._first.text("StudyInstanceUID")

    @property
    def frame_of_reference(self) -> str:
        """The frame of reference UID."""
        return self._first.text("FrameOfReferenceUID")

    @property
    def description(self) -> str:
        """The series description, with the part."""
        return " ".join(filter(None, (self._first.text("SeriesDescription"), self.part)))

    @property
    def _first(self) -> Slice:
        return self.slices[0]

    @cached_property
    def stack(self) -> Stack:
        """Where the slices lie; only for a series of single-frame files.

        Raises:
            IntakeError: they are no regular volume; the message says why.
        """
        return _stacked(self.slices)


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices of a regular volume.

    Attributes:
        slices: one per place, sorted along the normal.
        doubles: for each place, further files that claim it.
        affine: from (column, row, slice) to millimetres, RAS+; sheared if the gantry was tilted.
        notes: sentences on rounding.
    """

    slices: tuple[Slice, ...]
    doubles: Mapping[int, tuple[Slice, ...]]
    affine: NDArray[np.float64]
    notes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(columns, rows, slices)."""
        return _shape(self.slices[0], len(self.slices))

    @property
    def straight(self) -> Geometry:
        """The grid of the volume: the affine itself, or upright around a sheared one."""
        return _upright(self.affine, self.shape)


@dataclass(frozen=True, eq=False)
class DicomLabel:
    """A SEG or RTSTRUCT file, the series that it names, and the frames of reference that its places are in."""

    path: Path
    modality: str
    refers_to: frozenset[str]
    frames_of_reference: frozenset[str]


@dataclass(frozen=True, eq=False)
class FoundSeries:
    """What a folder holds: series, labels, and the files that are neither, with the reason."""

    series: tuple[DicomSeries, ...]
    labels: tuple[DicomLabel, ...]
    skipped: tuple[tuple[Path, str], ...]


def find_series(folder: Path, progress: Progress | None = None, limits: Limits = LIMITS) -> FoundSeries:
    """Read the header of every file below a folder and sort them into series.

    Slices of one series that differ in size or direction are volumes of their own; those that claim the same places are
    told apart by echo, phase, b-value or acquisition where one of these does it.

    Args:
        folder: exported from a PACS; file names and subfolders mean nothing. Or one file.
        progress: called with (files read, files).
        limits: largest file.
    """
    root = folder.parent if folder.is_file() else folder
    skipped: list[tuple[Path, str]] = []
    labels: list[DicomLabel] = []
    paths = list(files_below(folder, lambda path, reason: skipped.append((path, reason))))
    groups: dict[tuple[Any, ...], list[Slice]] = defaultdict(list)
    for done, path in enumerate(paths):
        if progress:
            progress(done, len(paths))
        try:
            header = read_header(root, path, limits)
            if text(header, "Modality") in LABEL_MODALITIES:
                labels.append(_label(path, header))
            else:
                found = image_slice(path, header)
                groups[_group(found)].append(found)
        except IntakeError as error:
            skipped.append((path, str(error)))
        except Exception as error:  # noqa: BLE001 - pydicom raises many kinds when it converts a damaged value
            skipped.append((path, f"a damaged DICOM file ({type(error).__name__})"))
    if progress:
        progress(len(paths), len(paths))
    series = [each for _, slices in sorted(groups.items(), key=lambda item: str(item[0])) for each in _split(slices)]
    return FoundSeries(tuple(series), tuple(labels), tuple(skipped))


def read_series(series: DicomSeries, limits: Limits = LIMITS) -> Volume:
    """Read a series: float32 in the units that its rescaling gives (Hounsfield units for CT).

    A tilted gantry is straightened by resampling within the slices; what then lies outside of them gets the smallest
    value.

    Raises:
        IntakeError: slices are missing, unevenly spaced, contradict each other or cannot be decoded.
    """
    first = series.slices[0]
    if first.frames > 1:
        return read_frames(first, limits)
    stack = series.stack
    check_shape(first.path, stack.shape, limits)
    voxels = np.empty(stack.shape, dtype=np.float32)
    for k, each in enumerate(stack.slices):
        pixels = read_slice(each)
        for double in stack.doubles.get(k, ()):
            if not np.array_equal(read_slice(double), pixels):
                raise IntakeError(
                    f"{_named(series)}: {each.path.name!a} and {double.path.name!a} claim the same place and differ, "
                    "so the series holds several images (phases or repetitions). Export them as series of their own."
                )
        voxels[:, :, k] = pixels.T
    return Volume(onto_straight(voxels, stack, 1, float(voxels.min())), stack.straight, stack.notes)


def describe(request: Request) -> dict[str, Any]:
    """Check in a process of its own (`guards.Worker`) that multi-frame `files` are a regular volume."""
    paths = [Path(each) for each in request["files"]]
    series = DicomSeries(tuple(image_slice(each, read_header(each.parent, each)) for each in paths))
    return {"shape": list(grid_of(series).shape)}


def grid_of(series: DicomSeries, limits: Limits = LIMITS) -> Geometry:
    """Return the grid on which `read_series` gives a series.

    Raises:
        IntakeError: as `read_series`, as far as headers tell.
    """
    first = series.slices[0]
    return series.stack.straight if first.frames == 1 else frames_grid(first, limits)


def onto_straight(voxels: NDArray[Any], stack: Stack, order: int, fill: float) -> NDArray[Any]:
    """Resample an array on a stack's own grid onto its upright one; the same array if they are one.

    Args:
        voxels: (columns, rows, slices).
        stack: where they lie.
        order: 0 takes the nearest voxel, for labels; 1 interpolates.
        fill: for what no slice shows.
    """
    target = stack.straight
    matrix = np.linalg.inv(stack.affine) @ target.affine.numpy()
    if np.allclose(matrix, np.eye(4), atol=1e-6):
        return voxels
    return np.asarray(
        ndimage.affine_transform(
            voxels, matrix[:3, :3], matrix[:3, 3], target.shape, order=order, mode="constant", cval=fill
        )
    )


def _label(path: Path, header: Any) -> DicomLabel:
    named = {str(item.get("SeriesInstanceUID", "")) for item in header.get("ReferencedSeriesSequence") or ()}
    frames = set()
    for frame in header.get("ReferencedFrameOfReferenceSequence") or ():
        frames.add(str(frame.get("FrameOfReferenceUID", "")))
        for study in frame.get("RTReferencedStudySequence") or ():
            for item in study.get("RTReferencedSeriesSequence") or ():
                named.add(str(item.get("SeriesInstanceUID", "")))
    frames.add(text(header, "FrameOfReferenceUID"))
    return DicomLabel(path, text(header, "Modality"), frozenset(filter(None, named)), frozenset(filter(None, frames)))


def _group(found: Slice) -> tuple[Any, ...]:
    header = found.header
    uid = str(header.get("SeriesInstanceUID", "")) or f"folder {found.path.parent}"
    if found.frames > 1:
        return uid, "frames", str(found.path)
    direction = () if found.orientation is None else tuple(np.round(found.orientation, 2) + 0.0)
    spacing = numbers(header, "PixelSpacing", 2)
    size = () if spacing is None else tuple(np.round(spacing, 4))
    return uid, int(header.Rows), int(header.Columns), direction, size


def _split(slices: list[Slice]) -> list[DicomSeries]:
    """Return one series, or several if one tag tells apart slices that claim the same places."""
    slices = sorted(slices, key=lambda each: (_instance(each), str(each.path)))
    if slices[0].frames > 1 or len(_places(slices)) == len(slices):
        return [DicomSeries(tuple(slices))]
    for keyword in SPLITTERS:
        parts: dict[str, list[Slice]] = defaultdict(list)
        for each in slices:
            parts[each.text(keyword)].append(each)
        if len(parts) > 1 and all(len(_places(part)) == len(part) for part in parts.values()):
            return [DicomSeries(tuple(part), f"{keyword} {value}") for value, part in sorted(parts.items())]
    return [DicomSeries(tuple(slices))]


def _instance(each: Slice) -> float:
    found = numbers(each.header, "InstanceNumber", 1)
    return 0.0 if found is None else float(found[0])


def _places(slices: Sequence[Slice]) -> set[tuple[float, ...]]:
    return {tuple(np.round(each.position / SAME_PLACE_MM)) for each in slices if each.position is not None}


def _named(series: DicomSeries) -> str:
    return f"series {shown(series.description) or shown(series.uid)}"


def _stacked(slices: tuple[Slice, ...]) -> Stack:
    first = slices[0]
    name = f"series {first.text('SeriesDescription') or first.text('SeriesInstanceUID')}"
    orientation, spacing = first.orientation, numbers(first.header, "PixelSpacing", 2)
    if len({each.text("PatientID") for each in slices}) > 1:
        raise IntakeError(f"{name}: its files name several patients. Export each patient's series again.")
    if orientation is None or spacing is None:
        raise IntakeError(f"{name}: its slices have no position.")
    row, column = orientation[:3], orientation[3:]
    normal = np.cross(row, column)
    positions = np.array([each.position for each in slices])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    kept: list[int] = []
    doubles: dict[int, list[Slice]] = defaultdict(list)
    for index in order:
        if kept and along[index] - along[kept[-1]] < SAME_PLACE_MM:
            doubles[len(kept) - 1].append(slices[index])
        else:
            kept.append(int(index))
    if len(kept) < SMALLEST_SIDE:
        raise IntakeError(
            f"{name}: it has {len(kept)} slices; at least {SMALLEST_SIDE} are needed. Is it a localizer or a key image?"
        )
    step, notes = _step(positions[kept], along[kept], normal, name)
    if doubles:
        notes.append(f"{sum(map(len, doubles.values()))} slices are there twice; each is used once")
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2], lps[:3, 3] = row * spacing[1], column * spacing[0], step, positions[kept[0]]
    affine = LPS_TO_RAS @ lps
    check_affine(first.path, affine)
    check_shape(first.path, _upright(affine, _shape(first, len(kept))).shape)
    return Stack(tuple(slices[k] for k in kept), {k: tuple(v) for k, v in doubles.items()}, affine, tuple(notes))


def _shape(first: Slice, slices: int) -> tuple[int, int, int]:
    return int(first.header.Columns), int(first.header.Rows), slices


def _step(
    positions: NDArray[np.float64], along: NDArray[np.float64], normal: NDArray[np.float64], name: str
) -> tuple[NDArray[np.float64], list[str]]:
    """Return the vector from one slice to the next, and notes."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if len(wide := np.flatnonzero(gaps > GAP * usual)):
        k = int(wide[0])
        missing = int(sum(round(gap / usual) - 1 for gap in gaps[wide]))
        if np.allclose(gaps[wide] / usual, np.round(gaps[wide] / usual), atol=0.1):
            raise IntakeError(
                f"{name}: {missing} slices are missing, the first {usual:.4g} mm after slice {k + 1} of {len(along)} "
                "(counted along the axis). Export the series again."
            )
    even = along[0] + np.arange(len(along)) * (along[-1] - along[0]) / (len(along) - 1)
    mean_gap = float((along[-1] - along[0]) / (len(along) - 1))
    worst = float(np.abs(along - even).max())
    if worst > UNEVEN * mean_gap + SAME_PLACE_MM:
        raise IntakeError(
            f"{name}: its slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart; an even distance is needed. Export "
            "a reconstruction with one slice distance."
        )
    notes = [f"slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart; {mean_gap:.4g} mm is used"]
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    drift = step - (step @ normal) * normal
    straight = positions[0] + np.arange(len(positions))[:, None] * step
    if np.abs(positions - straight).max() > UNEVEN * mean_gap + 10 * SAME_PLACE_MM:
        raise IntakeError(
            f"{name}: its slices do not lie behind each other on a line; export one series per direction."
        )
    tilted = float(np.linalg.norm(drift)) > TILT_MM
    if tilted:
        angle = np.degrees(np.arctan2(np.linalg.norm(drift), mean_gap))
        return step, [f"the gantry was tilted by {angle:.1f} degrees; the volume was straightened"]
    return (step @ normal) * normal, notes if float(np.ptp(gaps)) > 0.01 * mean_gap else []


def _upright(affine: NDArray[np.float64], shape: tuple[int, int, int]) -> Geometry:
    """Return the grid with right angles that covers a sheared one; the same grid if it is not sheared."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    distance = float(affine[:3, 2] @ normal)
    upright = affine.copy()
    upright[:3, 2] = distance * normal
    drift = np.linalg.solve(affine[:3, :3], affine[:3, 2] - upright[:3, 2])  # voxels per slice, within the plane
    drift = drift[:2] * (shape[2] - 1)
    drift[np.abs(drift) < 1e-6] = 0.0
    before, after = np.floor(np.minimum(drift, 0)), np.ceil(np.maximum(drift, 0))
    upright[:3, 3] += upright[:3, :2] @ before
    columns, rows = (int(side + more - less) for side, less, more in zip(shape[:2], before, after, strict=True))
    return Geometry((columns, rows, shape[2]), torch.from_numpy(upright))
