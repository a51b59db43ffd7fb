"""Load and check one scan, bring it onto the plan's grid, and bring predictions back onto the scan's own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.data.cases import Case
from semisam_core.errors import CaseError
from semisam_core.files import save_tensors
from semisam_core.plan import Plan
from semisam_core.plan_sections.task import Data

AFFINE_TOLERANCE_MM = 1e-2
PREPARED_VERSION = "1"


@dataclass(frozen=True)
class Geometry:
    """Where a voxel array lies: its shape (X, Y, Z) and the 4x4 affine from voxels to millimetres (RAS+)."""

    shape: tuple[int, int, int]
    affine: Tensor

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of a voxel along each array axis."""
        lengths = torch.linalg.norm(self.affine[:3, :3], dim=0)
        return (float(lengths[0]), float(lengths[1]), float(lengths[2]))


@dataclass(frozen=True)
class Scan:
    """A checked scan on the plan's grid.

    Attributes:
        id: the case's id.
        image: (C, H, W, D) float32, normalised as the plan says; H, W, D run along R, A, S.
        label: (H, W, D) uint8 of class indices (0 background, k the plan's k-th class), or None.
        grid: geometry of `image`.
        original: geometry of the file.
    """

    id: str
    image: Tensor
    label: Tensor | None
    grid: Geometry
    original: Geometry


def load_scan(case: Case, plan: Plan, prepared: Path | None = None) -> Scan:
    """Read, check and prepare one case.

    Args:
        case: which files. An unlabeled case has no label path, so its label cannot be read.
        plan: spacing, intensity and classes.
        prepared: folder in which prepared scans are kept, keyed by content of the files and the plan's grid.

    Raises:
        CaseError: the file is truncated, not 3D, not finite, or its label does not fit.
    """
    key = _prepared_key(case, plan)
    if prepared is not None and (kept := _read_prepared(prepared / f"{key}.safetensors", case.id)):
        return kept
    scan = _prepare(case, plan)
    if prepared is not None:
        _write_prepared(prepared / f"{key}.safetensors", scan)
    return scan


def load_original_label(case: Case, plan: Plan) -> tuple[Tensor, Geometry]:
    """Return a case's label in the file's own geometry: (X, Y, Z) uint8 of class indices.

    Raises:
        CaseError: the case has no readable label, or it has values outside the plan's classes.
    """
    if case.label is None:
        raise CaseError(f"{case.id}: an {case.role.value} case has no label to read.")
    array, affine = _read_nifti(case.label, case.id, "label")
    return _class_indices(array, plan, case.id), Geometry(_shape(array), affine)


def keep_classes(label: Tensor, classes: Collection[int]) -> Tensor:
    """Return class indices with 0 wherever the class is not one of these (counted from 1)."""
    return torch.where(torch.isin(label, torch.tensor(sorted(classes), dtype=label.dtype)), label, 0)


def to_original(probability: Tensor, scan: Scan) -> Tensor:
    """Resample class probabilities (K, H, W, D) from the plan's grid to the scan's own: (K, X, Y, Z)."""
    return resample(probability, scan.grid, scan.original)


def resample(maps: Tensor, source: Geometry, target: Geometry) -> Tensor:
    """Resample maps (K, ...) from one grid to another, linearly; beyond the source's edge they keep its values."""
    if source.shape == target.shape and torch.allclose(source.affine, target.affine):
        return maps
    mover = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)
    moved = mover(
        MetaTensor(maps.float().cpu(), affine=source.affine), dst_affine=target.affine, spatial_size=target.shape
    )
    tensor: Tensor = moved.as_tensor()
    return tensor


def _prepare(case: Case, plan: Plan) -> Scan:
    arrays, affines = zip(*(_read_nifti(path, case.id, "image") for path in case.images), strict=True)
    original = Geometry(_shape(arrays[0]), affines[0])
    for array, affine in zip(arrays[1:], affines[1:], strict=True):
        _check_same_grid(case.id, "channel", original, Geometry(_shape(array), affine))
    stack = np.stack(arrays).astype(np.float32)
    if not np.isfinite(stack).all():
        raise CaseError(f"{case.id}: the image has {int((~np.isfinite(stack)).sum())} NaN or infinite voxels.")
    image = _onto_grid(torch.from_numpy(stack), original.affine, plan.data, "bilinear")
    label = None
    if case.label is not None:
        indices, geometry = load_original_label(case, plan)
        _check_same_grid(case.id, "label", original, geometry)
        moved = _onto_grid(indices[None].float(), original.affine, plan.data, "nearest")
        label = moved.as_tensor()[0].round().to(torch.uint8)
    grid = Geometry(_shape(image[0]), image.affine.double().cpu())
    return Scan(case.id, _normalise(image.as_tensor(), plan.data), label, grid, original)


def _read_nifti(path: Path, case_id: str, what: str) -> tuple[NDArray[np.float32], Tensor]:
    try:
        file = nib.load(path)
        array = np.asarray(file.dataobj, dtype=np.float32)
        affine = np.asarray(file.affine, dtype=np.float64)
    except Exception as error:  # noqa: BLE001 - nibabel, zlib and gzip raise many kinds for a bad file
        raise CaseError(f"{case_id}: the {what} file cannot be read ({type(error).__name__}: {error}).") from None
    if array.ndim != 3:
        raise CaseError(f"{case_id}: the {what} is {array.ndim}D with shape {array.shape}; a 3D volume is expected.")
    if min(array.shape) < 4:
        raise CaseError(f"{case_id}: the {what} has shape {array.shape}; at least 4 voxels a side are needed.")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise CaseError(f"{case_id}: the {what} has no usable affine (voxel size and direction).")
    return array, torch.from_numpy(affine)


def _check_same_grid(case_id: str, what: str, expected: Geometry, found: Geometry) -> None:
    if expected.shape != found.shape:
        raise CaseError(f"{case_id}: the {what} has shape {found.shape}, the image has {expected.shape}.")
    apart = float((expected.affine - found.affine).abs().max())
    if apart > AFFINE_TOLERANCE_MM:
        raise CaseError(f"{case_id}: the {what} lies elsewhere than the image: affines differ by up to {apart:.3g} mm.")


def _class_indices(array: NDArray[np.float32], plan: Plan, case_id: str) -> Tensor:
    classes = enumerate(plan.task.classes, start=1)
    accepted = {0: 0} | {value: k for k, target in classes for value in target.label_values}
    values = np.unique(array)
    foreign = [float(value) for value in values if float(value) not in accepted]
    if plan.task.ignore_other_values:
        foreign = [value for value in foreign if not (value >= 1 and value.is_integer())]
    if foreign:
        shown = ", ".join(f"{value:g}" for value in foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise CaseError(f"{case_id}: the label has the values {shown}; the plan's classes accept {sorted(accepted)}.")
    indices = np.zeros(array.shape, np.uint8)
    for value, index in accepted.items():
        indices[array == value] = index
    return torch.from_numpy(indices)


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


def _prepared_key(case: Case, plan: Plan) -> str:
    digest = hashlib.sha256()
    grid = plan.data.model_dump_json(include={"spacing_mm", "intensity"})
    classes = ([c.label_values for c in plan.task.classes], plan.task.ignore_other_values)
    digest.update(f"{PREPARED_VERSION}|{grid}|{classes}|{len(plan.task.channels)}".encode())
    for path in (*case.images, *((case.label,) if case.label is not None else ())):
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
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
        save_tensors(path, tensors)
    except OSError as error:
        logging.getLogger(__name__).warning("A prepared scan could not be kept on disk: %s", error.strerror)


def _read_prepared(path: Path, case_id: str) -> Scan | None:
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None
    image, label = kept["image"], kept.get("label")
    shape = kept["original_shape"].tolist()
    original = Geometry((shape[0], shape[1], shape[2]), kept["original_affine"])
    return Scan(case_id, image, label, Geometry(_shape(image[0]), kept["grid_affine"]), original)
