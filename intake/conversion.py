"""Read one scan from its sources and write it as NIfTI, or hand it over; nothing then tells who the patient is.

Runs in a child process (`guards.Worker`), so requests and answers are JSON.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from intake.candidates import Source
from intake.dicom.headers import image_slice, read_header
from intake.dicom.labels import read_label
from intake.dicom.series import DicomSeries, read_series
from intake.files import read_channels, read_labels, read_volume
from intake.guards import LIMITS, Limits, Request, shown
from intake.h5 import read_h5
from intake.volume import IntakeError, LabelVolume, Volume
from semisam_core.data.geometry import CORNER_TOLERANCE_VOXELS, Geometry, axis_change, corner_distance
from semisam_core.data.nifti import by_axis
from semisam_core.files import write_atomically

COMPRESSION = 5
_SCANNER = 1  # NIfTI's code for coordinates of the scanner


def convert(request: Request) -> dict[str, Any]:
    """Read and write one scan.

    Args:
        request: `channels` and `label` (as `Source`), `images` and `label_file` (paths to write), `classes` (name ->
            value of the labels to write, or null), `spacing_mm` (for h5), `partial_labels` (refuse or crop).

    Returns:
        `channels` (sha256, shape, spacing_mm of each), `label` (sha256, classes) or None, `without_label` (why there is
        none although there was a source), and `notes`.

    Raises:
        IntakeError: an image cannot be taken. A label that cannot be taken costs the label only.
    """
    channels = [Source.model_validate(each) for each in request["channels"]]
    spacing = tuple(request["spacing_mm"]) if request["spacing_mm"] else None
    volumes = [read_source(each, spacing) for each in channels]
    notes = list(dict.fromkeys(note for each in volumes for note in each.notes))
    volumes, moved = on_one_grid(volumes)
    notes += moved
    label, without_label = None, None
    if request["label"] is not None:
        try:
            source = Source.model_validate(request["label"])
            label = _label(source, channels, spacing, request["classes"])
            volumes, label, more = _fitted(volumes, label, request["partial_labels"])
            notes += [*label.volume.notes, *more]
        except IntakeError as error:
            label, without_label = None, str(error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a label costs the label only
            label, without_label = None, f"it cannot be read ({type(error).__name__}: {shown(error)})"
    written = [
        _write(Path(path), each.voxels, each.geometry) for path, each in zip(request["images"], volumes, strict=True)
    ]
    answer: dict[str, Any] = {"channels": written, "label": None, "without_label": without_label, "notes": notes}
    if label is not None:
        record = _write(Path(request["label_file"]), label.volume.voxels, volumes[0].geometry)
        answer["label"] = {"sha256": record["sha256"], "classes": {str(k): v for k, v in label.names.items()}}
    return answer


def hand_over(request: Request) -> dict[str, Any]:
    """Read a scan's channels onto the first one's grid, and write their voxels as plain numbers for the parent.

    Args:
        request: `channels` (as `Source`), `spacing_mm` (for h5, or null), `voxels` (the most that a channel may have),
            and `into`, the file to write to: float32, channel by channel, the last axis fastest.

    Returns:
        `shape` and `affine` of every channel, and `notes`.

    Raises:
        IntakeError: a channel cannot be read.
    """
    spacing = tuple(request["spacing_mm"]) if request["spacing_mm"] else None
    limits = replace(LIMITS, voxels=request["voxels"])
    read = [read_source(Source.model_validate(each), spacing, limits) for each in request["channels"]]
    notes = list(dict.fromkeys(note for each in read for note in each.notes))
    volumes, moved = on_one_grid(read)
    with open(request["into"], "wb") as file:
        for each in volumes:
            np.ascontiguousarray(each.voxels, dtype=np.float32).tofile(file)
    grid = volumes[0].geometry
    return {"shape": list(grid.shape), "affine": grid.affine.tolist(), "notes": [*notes, *moved]}


def read_source(source: Source, spacing: tuple[float, float, float] | None, limits: Limits = LIMITS) -> Volume:
    """Read one channel; `spacing` (mm) is for h5 files.

    Raises:
        IntakeError: it cannot be read.
    """
    path = Path(source.paths[0])
    if source.kind == "dicom":
        return read_series(series_of(source), limits)
    if source.kind == "h5":
        return read_h5(path, spacing, limits)[0]
    if source.channel is None:
        return read_volume(path, limits)
    parts = read_channels(path, limits)
    if source.channel >= len(parts):
        raise IntakeError(f"{path.name!a}: it has {len(parts)} channels; number {source.channel} is asked for.")
    return parts[source.channel]


def series_of(source: Source) -> DicomSeries:
    """Return the DICOM series that a source names, its headers read again."""
    paths = [Path(each) for each in source.paths]
    return DicomSeries(tuple(image_slice(each, read_header(each.parent, each)) for each in paths))


def _label(
    source: Source,
    channels: list[Source],
    spacing: tuple[float, float, float] | None,
    classes: Mapping[str, int] | None,
) -> LabelVolume:
    path = Path(source.paths[0])
    if source.kind == "dicom-label":
        found = read_label(path, source.modality, series_of(channels[0]), None if classes is None else list(classes))
    elif source.kind == "h5":
        label = read_h5(path, spacing)[1]
        if label is None:
            raise IntakeError(f"{path.name!a}: it has no label.")
        found = label
    else:
        found = LabelVolume(read_labels(path).volume, source.names)
    return found if classes is None else _with_values(found, classes)


def _with_values(label: LabelVolume, classes: Mapping[str, int]) -> LabelVolume:
    """Give named structures the values of the classes; a label without names keeps its values."""
    names = {value: name for name, value in classes.items()}
    if not label.names:
        present = set(np.unique(label.volume.voxels).tolist()) - {0}
        return LabelVolume(label.volume, {k: names[k] for k in sorted(present & set(names))} or names)
    wanted = {name.casefold(): value for name, value in classes.items()}
    table = np.zeros(65536, dtype=np.uint16)
    chosen = {}
    for number, name in label.names.items():
        if (value := wanted.get(name.casefold())) is not None:
            table[number], chosen[value] = value, names[value]
    if not chosen:
        raise IntakeError(f"the label has {', '.join(label.names.values())}; wanted are {', '.join(classes)}.")
    volume = Volume(table[label.volume.voxels], label.volume.geometry, label.volume.notes)
    return LabelVolume(volume, chosen)


def on_one_grid(volumes: list[Volume]) -> tuple[list[Volume], list[str]]:
    """Resample channels onto the first one's grid where theirs is another."""
    first, moved, notes = volumes[0].geometry, [volumes[0]], []
    for k, each in enumerate(volumes[1:], start=1):
        if _same(first, each.geometry):
            moved.append(each)
            continue
        from semisam_core.data.scans import resample  # MONAI, which most imports do not need

        image = resample(torch.from_numpy(np.ascontiguousarray(each.voxels))[None], each.geometry, first)[0].numpy()
        notes.append(f"channel {k} had another grid and was interpolated onto the first one's")
        moved.append(Volume(image, first, each.notes))
    return moved, notes


def _same(first: Geometry, second: Geometry) -> bool:
    return first.shape == second.shape and corner_distance(first, second)[0] <= CORNER_TOLERANCE_VOXELS


def _fitted(volumes: list[Volume], label: LabelVolume, partial: str) -> tuple[list[Volume], LabelVolume, list[str]]:
    """Bring a label onto the images' axes; crop the images to a label of a part of them if that is allowed.

    Raises:
        IntakeError: the label does not lie on the images' voxels, or covers a part only.
    """
    image = volumes[0].geometry
    change = axis_change(label.volume.geometry, image)
    grid, voxels = change.geometry(label.volume.geometry), change.array(label.volume.voxels)
    if _same(image, grid):
        return volumes, LabelVolume(Volume(voxels, image, label.volume.notes), label.names), []
    relative = np.linalg.inv(image.affine.numpy()) @ grid.affine.numpy()
    start = np.rint(relative[:3, 3]).astype(int)
    ends = start + np.array(grid.shape)
    aligned = (
        np.abs(relative[:3, :3] - np.eye(3)).max() * max(grid.shape) <= CORNER_TOLERANCE_VOXELS
        and np.abs(relative[:3, 3] - start).max() <= CORNER_TOLERANCE_VOXELS
    )
    if not aligned or (start < 0).any() or (ends > np.array(image.shape)).any():
        raise IntakeError(
            f"the label has shape {grid.shape} and voxels of {by_axis(grid.spacing_mm)} mm, the image {image.shape} "
            f"and {by_axis(image.spacing_mm)} mm, and they do not lie on each other. Export both from the same series."
        )
    if partial != "crop":
        raise IntakeError(
            f"the label covers {by_axis(grid.shape)} of the image's {by_axis(image.shape)} voxels. What it leaves out "
            "is not background: --partial-labels crop takes the labeled part of the scan alone."
        )
    part = tuple(slice(int(a), int(b)) for a, b in zip(start, ends, strict=True))
    affine = image.affine.clone()
    affine[:3, 3] = affine[:3, 3] + affine[:3, :3] @ torch.from_numpy(start).double()
    cropped = Geometry(grid.shape, affine)
    images = [Volume(np.ascontiguousarray(each.voxels[part]), cropped, each.notes) for each in volumes]
    note = f"the label covers a part of the scan; the scan was cropped to it: {grid.shape} of {image.shape} voxels"
    return images, LabelVolume(Volume(voxels, cropped, label.volume.notes), label.names), [note]


def _write(path: Path, voxels: NDArray[Any], geometry: Geometry) -> dict[str, Any]:
    """Write a NIfTI file that holds voxels and geometry, and no other text; the same content gives the same bytes."""
    file = nib.Nifti1Image(_compact(voxels), None)
    affine = geometry.affine.numpy()
    file.set_sform(affine, _SCANNER)
    file.set_qform(affine, _SCANNER)
    file.header.set_xyzt_units("mm")
    content = gzip.compress(file.to_bytes(), COMPRESSION, mtime=0)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise IntakeError(f"{path}: it cannot be written ({error.strerror}).") from None
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "shape": list(geometry.shape),
        "spacing_mm": [round(side, 6) for side in geometry.spacing_mm],
    }


def _compact(voxels: NDArray[Any]) -> NDArray[Any]:
    """Return the smallest type that holds the values exactly."""
    low, high = float(voxels.min()), float(voxels.max())
    whole = voxels.dtype.kind in "iu" or bool((voxels == np.rint(voxels)).all())
    for kind in (np.uint8, np.int16, np.uint16) if whole else ():
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return voxels.astype(kind)
    return voxels.astype(np.float32)
