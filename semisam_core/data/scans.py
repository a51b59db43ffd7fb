"""Load and check one scan, bring it onto the plan's grid, and bring predictions back onto the scan's own."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    NormalizeIntensity,
    Orientation,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
    SpatialResample,
)
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from semisam_core.data.cases import Case
from semisam_core.data.geometry import Geometry, axis_change, check_same_grid
from semisam_core.data.labels import class_indices
from semisam_core.data.nifti import NiftiVolume, by_axis, open_nifti
from semisam_core.errors import CaseError
from semisam_core.files import save_tensors
from semisam_core.plan import Plan
from semisam_core.plan_sections.task import Data

PREPARED_VERSION = "2"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """A checked scan on the plan's grid.

    Attributes:
        id: the case's id.
        image: (C, H, W, D) float32, normalised as the plan says; H, W, D run along R, A, S.
        label: (H, W, D) uint8 of class indices (0 background, k the plan's k-th class), or None.
        grid: geometry of `image`.
        original: geometry of the image file.
        notes: sentences on conversions and rounding.
    """

    id: str
    image: Tensor
    label: Tensor | None
    grid: Geometry
    original: Geometry
    notes: tuple[str, ...] = ()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_scan(
    case: Case,
    plan: Plan,
    prepared: Path | None = None,
    memory_gb: float | None = None,
    sha256: Callable[[Path], str] = file_sha256,
) -> Scan:
    """Read, check and prepare one case.

    Conversions and rounding are logged when the scan is prepared, and kept in `Scan.notes`. A scan that is prepared
    already is read from there alone; its own files are then opened by `sha256` at most.

    Args:
        case: which files. An unlabeled case has no label path, so its label cannot be read.
        plan: spacing, intensity, classes, and what to do with NaN.
        prepared: folder of prepared scans, keyed by the content of the files and the plan's grid.
        memory_gb: largest image to load, on its own or on the plan's grid; None for no limit. Judged by headers alone.
        sha256: returns a file's content hash, or raises OSError; only asked if there is a folder of prepared scans.

    Raises:
        CaseError: a file is unreadable, no 3D volume of a plausible size, too large, or not finite; or channels or
            label do not fit the image.
    """
    path = prepared / f"{prepared_key(case, plan, sha256)}.safetensors" if prepared is not None else None
    if path is not None and (kept := _read_prepared(path, case.id, plan.data, memory_gb)):
        return kept
    channels = [open_nifti(each, case.id, "image") for each in case.images]
    if memory_gb is not None:
        _check_memory(case.id, [channel.geometry for channel in channels], plan.data, memory_gb)
    scan = _prepare(case, channels, plan)
    for note in scan.notes:
        logger.warning("%s: %s.", case.id, note)
    if path is not None:
        _write_prepared(path, scan)
    return scan


def load_original_label(case: Case, plan: Plan) -> tuple[Tensor, Geometry]:
    """Return a case's label on the grid of its image file: (X, Y, Z) uint8 of class indices, and that grid.

    A label stored along other axes than the image is permuted and flipped into the image's order.

    Raises:
        CaseError: the case has no readable label, the label does not lie on the image, or it has values outside the
            plan's classes.
    """
    if case.label is None:
        raise CaseError(f"{case.id}: an {case.role.value} case has no label to read.")
    image = open_nifti(case.images[0], case.id, "image").geometry
    array = _read_onto(image, open_nifti(case.label, case.id, "label"), "label")
    return class_indices(array, plan.task, case.id)[0], image


def keep_classes(label: Tensor, classes: Collection[int]) -> Tensor:
    """Return class indices with 0 wherever the class is not one of these (counted from 1)."""
    return torch.where(torch.isin(label, torch.tensor(sorted(classes), dtype=label.dtype)), label, 0)


def to_original(probability: Tensor, scan: Scan) -> Tensor:
    """Resample class probabilities (K, H, W, D) from the plan's grid to the scan's own: (K, X, Y, Z)."""
    return resample(probability, scan.grid, scan.original)


def resample(maps: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """Resample maps (K, ...) linearly from one grid to another; outside the source, its edge values continue."""
    if source.shape == target.shape and torch.allclose(source.affine, target.affine):
        return maps
    resampler = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
    moved = resampler(
        MetaTensor(maps.float().cpu(), affine=source.affine), dst_affine=target.affine, spatial_size=target.shape
    )
    tensor: Tensor = moved.as_tensor()
    return tensor


def planned_shape(original: Geometry, data: Data) -> tuple[int, int, int]:
    """Return about what shape a scan has on the plan's grid (H, W, D), without reading it."""
    along_ras = axis_change(original, Geometry(original.shape, torch.eye(4, dtype=torch.float64))).geometry(original)
    x, y, z = (math.ceil(extent / step) for extent, step in zip(along_ras.extent_mm, data.spacing_mm, strict=True))
    return x, y, z


def _check_memory(case_id: str, channels: Sequence[Geometry], data: Data, memory_gb: float) -> None:
    original = channels[0]
    grid = planned_shape(original, data)
    voxels = max(math.prod(grid), *(math.prod(each.shape) for each in channels))
    needed_gb = len(channels) * voxels * 4 / 1e9
    if needed_gb > memory_gb:
        raise CaseError(
            f"{case_id}: the image would take {needed_gb:.3g} GB of memory, storage.memory_gb allows {memory_gb:g}. It "
            f"has shape {original.shape} and voxels of {by_axis(original.spacing_mm)} mm; on the plan's grid its shape "
            f"would be about {grid}. Correct the voxel size if it is wrong, or raise storage.memory_gb."
        )


def _prepare(case: Case, channels: Sequence[NiftiVolume], plan: Plan) -> Scan:
    original = channels[0].geometry
    stack = np.stack([_read_onto(original, channel, "channel") for channel in channels])  # (C, X, Y, Z)
    notes = list(dict.fromkeys(note for channel in channels for note in channel.notes))
    indices, label = None, None
    if case.label is not None:
        volume = open_nifti(case.label, case.id, "label")
        indices, rounded = class_indices(_read_onto(original, volume, "label"), plan.task, case.id)
        moved = _onto_grid(indices[None].float(), original.affine, plan.data, "nearest")
        label = moved.as_tensor()[0].round().to(torch.uint8)
        notes += [*volume.notes, *rounded]
    prepared = prepare_image(case.id, stack, original, plan.data, indices)
    return replace(prepared, label=label, notes=(*notes, *prepared.notes))


def prepare_image(
    case_id: str, stack: NDArray[np.float32], original: Geometry, data: Data, label: Tensor | None = None
) -> Scan:
    """Bring an image onto the plan's grid and normalise it, exactly as for training.

    Args:
        case_id: for messages, and the scan's id.
        stack: (C, X, Y, Z), the channels; NaN in it may be set to 0.
        original: where its voxels lie.
        data: the plan's section on data.
        label: (X, Y, Z) class indices on the same grid, where NaN may not be; the scan that is returned has none.

    Raises:
        CaseError: voxels are not finite.
    """
    notes = _make_finite(stack, label, data, case_id)
    image = _onto_grid(torch.from_numpy(stack), original.affine, data, "bilinear")
    grid = Geometry(_shape(image[0]), image.affine.double().cpu())
    normalised = _normalise(image.as_tensor(), data).as_subclass(Tensor)
    return Scan(case_id, normalised, None, grid, original, tuple(notes))


def _read_onto(image: Geometry, volume: NiftiVolume, what: str) -> NDArray[np.float32]:
    """Read a volume and permute and flip its axes into the image's order, without interpolation: (X, Y, Z).

    The grids are compared before any voxel is read.
    """
    change = axis_change(volume.geometry, image)
    check_same_grid(volume.case_id, what, image, change.geometry(volume.geometry))
    return change.array(volume.voxels())


def _make_finite(stack: NDArray[np.float32], label: Tensor | None, data: Data, case_id: str) -> list[str]:
    """Set NaN to zero in place if the plan says `nan: zero`; return a note if there was any.

    NaN must be background, as registration or masking leaves it: it may neither fill a channel nor lie where the label
    marks a structure.
    """
    missing = np.isnan(stack)
    count, bad = int(missing.sum()), int((~np.isfinite(stack)).sum())
    if bad > count or (bad and data.nan == "refuse"):
        hint = "" if bad > count else " If NaN marks background only, the plan may say data.nan: zero."
        raise CaseError(f"{case_id}: the image has {bad} NaN or infinite voxels.{hint}")
    if missing.all(axis=(1, 2, 3)).any():
        raise CaseError(f"{case_id}: every voxel of a channel is NaN.")
    if label is not None and bool((missing.any(0) & (label.numpy() > 0)).any()):
        raise CaseError(
            f"{case_id}: the image is NaN where the label marks a structure; data.nan: zero is for background."
        )
    stack[missing] = 0.0
    return [f"{count} NaN voxels were set to 0, as the plan's data.nan says"] if count else []


def _onto_grid(channels: Tensor, affine: Tensor, data: Data, mode: str) -> MetaTensor:
    volume = MetaTensor(channels, affine=affine)
    oriented = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(volume)
    resampled: MetaTensor = Spacing(pixdim=data.spacing_mm, mode=mode, padding_mode="border", dtype=torch.float32)(
        oriented
    )
    return resampled


def _normalise(image: Tensor, data: Data) -> Tensor:
    lower, upper = data.intensity.lower, data.intensity.upper
    if data.intensity.kind == "window":
        scale = ScaleIntensityRange(a_min=lower, a_max=upper, b_min=0.0, b_max=1.0, clip=True)
        return torch.as_tensor(scale(image), dtype=torch.float32)
    clipped = torch.stack(
        [ScaleIntensityRangePercentiles(lower, upper, b_min=0.0, b_max=1.0, clip=True)(c) for c in image]
    )
    return torch.as_tensor(NormalizeIntensity(channel_wise=True)(clipped), dtype=torch.float32)


def _shape(array: NDArray[np.float32] | Tensor) -> tuple[int, int, int]:
    height, width, depth = array.shape
    return int(height), int(width), int(depth)


def prepared_key(case: Case, plan: Plan, sha256: Callable[[Path], str] = file_sha256) -> str:
    """Return a hash of a case's content and of everything in the plan that its preparation depends on.

    Args:
        case: which files.
        plan: spacing, intensity, classes.
        sha256: returns a file's content hash, or raises OSError.

    Raises:
        CaseError: a file cannot be read.
    """
    digest = hashlib.sha256()
    grid = plan.data.model_dump_json(include={"spacing_mm", "intensity"})
    classes = ([c.label_values for c in plan.task.classes], plan.task.ignore_other_values)
    digest.update(f"{PREPARED_VERSION}|{grid}|{plan.data.nan}|{classes}|{len(plan.task.channels)}".encode())
    for path in (*case.images, *((case.label,) if case.label is not None else ())):
        try:
            digest.update(bytes.fromhex(sha256(path)))
        except OSError as error:
            raise CaseError(f"{case.id}: a file cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def _write_prepared(path: Path, scan: Scan) -> None:
    tensors = {
        "image": scan.image,
        "grid_affine": scan.grid.affine,
        "original_affine": scan.original.affine,
        "original_shape": torch.tensor(scan.original.shape),
    }
    if scan.label is not None:
        tensors["label"] = scan.label
    try:
        save_tensors(path, tensors, {"notes": json.dumps(scan.notes)})
    except OSError as error:
        logger.warning("A prepared scan could not be kept on disk: %s", error.strerror)


def _read_prepared(path: Path, case_id: str, data: Data, memory_gb: float | None) -> Scan | None:
    try:
        with safe_open(path, framework="pt") as file:
            x, y, z = file.get_tensor("original_shape").tolist()
            original = Geometry((x, y, z), file.get_tensor("original_affine"))
            if memory_gb is not None:
                channels = file.get_slice("image").get_shape()[0]
                _check_memory(case_id, [original] * channels, data, memory_gb)
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            notes = tuple(json.loads((file.metadata() or {}).get("notes", "[]")))
    except (OSError, SafetensorError):
        return None
    image, label = kept["image"], kept.get("label")
    return Scan(case_id, image, label, Geometry(_shape(image[0]), kept["grid_affine"]), original, notes)
