"""Load and check one scan, bring it onto the plan's grid, and bring predictions back onto the scan's own."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, ScaleIntensityRange, Spacing
from monai.transforms.utils_pytorch_numpy_unification import percentile
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from semisam_core.data.cases import Case
from semisam_core.data.geometry import Geometry, axis_change, check_same_grid
from semisam_core.data.labels import class_indices
from semisam_core.data.nifti import NiftiVolume, check_memory, open_nifti
from semisam_core.data.resampling import resample_blocks
from semisam_core.errors import CaseError
from semisam_core.files import save_tensors
from semisam_core.plan import Plan
from semisam_core.plan_sections.task import Data
from semisam_core.scratch import Scratch

PREPARED_VERSION = "2"
SLAB_ROWS = 8  # of a scan, normalised at once

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


@dataclass(frozen=True)
class StoredVolume:
    """A tensor on disk, of which boxes are read.

    Attributes:
        path: the safetensors file.
        name: the tensor's name in it.
        shape: its shape.
    """

    path: Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        """Read a box.

        Raises:
            CaseError: the file is gone or damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_slice(self.name)[box]
        except (OSError, SafetensorError) as error:
            raise CaseError(f"{self.path}: the prepared scan cannot be read ({error}).") from None
        return tensor


def stored_image(case: Case, plan: Plan, prepared: Path, sha256: Callable[[Path], str]) -> StoredVolume | None:
    """Return a case's image on the plan's grid as it lies on disk, unread; None if it is not prepared.

    Raises:
        CaseError: a file of the case cannot be read.
    """
    path = prepared / f"{prepared_key(case, plan, sha256)}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return StoredVolume(path, "image", tuple(file.get_slice("image").get_shape()))
    except (OSError, SafetensorError):
        return None


def load_scan(
    case: Case,
    plan: Plan,
    prepared: Path | None = None,
    memory_gb: float | None = None,
    sha256: Callable[[Path], str] = file_sha256,
    check: Callable[[Geometry], None] = lambda _: None,
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
        check: is given the image file's grid before any voxel is read, and raises CaseError if the case cannot be used.

    Raises:
        CaseError: a file is unreadable, no 3D volume of a plausible size, too large, or not finite; or channels or
            label do not fit the image.
    """
    path = prepared / f"{prepared_key(case, plan, sha256)}.safetensors" if prepared is not None else None
    if path is not None and (kept := _read_prepared(path, case.id, plan.data, memory_gb, check)):
        return kept
    channels = [open_nifti(each, case.id, "image") for each in case.images]
    if memory_gb is not None:
        check_memory(case.id, [each.geometry for each in channels], plan.data.spacing_mm, memory_gb)
    check(channels[0].geometry)
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
    array = read_onto(image, open_nifti(case.label, case.id, "label"), "label")
    return class_indices(array, plan.task, case.id)[0], image


def keep_classes(label: Tensor, classes: Collection[int]) -> Tensor:
    """Return class indices with 0 wherever the class is not one of these (counted from 1)."""
    return torch.where(torch.isin(label, torch.tensor(sorted(classes), dtype=label.dtype)), label, 0)


def to_original(probability: Tensor, scan: Scan) -> Tensor:
    """Resample class probabilities (K, H, W, D) from the plan's grid to the scan's own: (K, X, Y, Z)."""
    return resample(probability, scan.grid, scan.original)


def resample(maps: Tensor, source: Geometry, target: Geometry, scratch: Scratch | None = None) -> Tensor:
    """Resample maps (K, ...) linearly from one grid to another; outside the source, its edge values continue.

    They are, and the result will be, in `scratch`; None for memory.
    """
    if source.shape == target.shape and torch.allclose(source.affine, target.affine):
        return maps
    return resample_blocks(maps.float().cpu(), source, target, scratch=scratch)


def _prepare(case: Case, channels: Sequence[NiftiVolume], plan: Plan) -> Scan:
    original = channels[0].geometry
    arrays = [read_onto(original, channel, "channel") for channel in channels]  # C of (X, Y, Z)
    notes = list(dict.fromkeys(note for channel in channels for note in channel.notes))
    oriented, grid = _plans_grid(original, plan.data)
    indices, label = None, None
    if case.label is not None:
        volume = open_nifti(case.label, case.id, "label")
        indices, rounded = class_indices(read_onto(original, volume, "label"), plan.task, case.id)
        along_ras = torch.from_numpy(_along_ras(indices.numpy(), original)).float()[None]
        label = resample_blocks(along_ras, oriented, grid, "nearest")[0].round().to(torch.uint8)
        del along_ras
        notes += [*volume.notes, *rounded]
    prepared = prepare_image(case.id, arrays, original, plan.data, indices)
    return replace(prepared, label=label, notes=(*notes, *prepared.notes))


def prepare_image(
    case_id: str,
    channels: list[NDArray[np.float32]] | NDArray[np.float32],
    original: Geometry,
    data: Data,
    label: Tensor | None = None,
) -> Scan:
    """Bring an image onto the plan's grid and normalise it, exactly as for training.

    Args:
        case_id: for messages, and the scan's id.
        channels: C of (X, Y, Z); NaN in them may be set to 0. A list is emptied on the way, to free memory.
        original: where its voxels lie.
        data: the plan's section on data.
        label: (X, Y, Z) class indices on the same grid, where NaN may not be; the scan that is returned has none.

    Raises:
        CaseError: voxels are not finite.
    """
    arrays = channels if isinstance(channels, list) else list(channels)
    notes = _make_finite(arrays, label, data, case_id)
    oriented, grid = _plans_grid(original, data)
    image = torch.empty((len(arrays), *grid.shape))
    for channel in image:
        values = torch.from_numpy(_along_ras(arrays.pop(0), original))  # each copy replaces what it was made from
        channel.copy_(resample_blocks(values[None], oriented, grid)[0])
        del values
        _normalise(channel, data)
    return Scan(case_id, image, None, grid, original, tuple(notes))


def read_onto(image: Geometry, volume: NiftiVolume, what: str) -> NDArray[np.float32]:
    """Read a volume and permute and flip its axes into the image's order, without interpolation: (X, Y, Z).

    The grids are compared before any voxel is read.

    Raises:
        CaseError: it does not lie on the image, or its voxels cannot be read.
    """
    change = axis_change(volume.geometry, image)
    check_same_grid(volume.case_id, what, image, change.geometry(volume.geometry))
    return change.array(volume.voxels())


def _make_finite(channels: Sequence[NDArray[np.float32]], label: Tensor | None, data: Data, case_id: str) -> list[str]:
    """Set NaN to zero in place if the plan says `nan: zero`; return a note if there was any.

    NaN must be background, as registration or masking leaves it: it may neither fill a channel nor lie where the label
    marks a structure.
    """
    missing = [np.isnan(channel) for channel in channels]
    count = sum(int(mask.sum()) for mask in missing)
    bad = sum(channel.size - int(np.isfinite(channel).sum()) for channel in channels)
    if bad > count or (bad and data.nan == "refuse"):
        hint = "" if bad > count else " If NaN marks background only, the plan may say data.nan: zero."
        raise CaseError(f"{case_id}: the image has {bad} NaN or infinite voxels.{hint}")
    if any(mask.all() for mask in missing):
        raise CaseError(f"{case_id}: every voxel of a channel is NaN.")
    if label is not None and any((mask & (label.numpy() > 0)).any() for mask in missing):
        raise CaseError(
            f"{case_id}: the image is NaN where the label marks a structure; data.nan: zero is for background."
        )
    for channel, mask in zip(channels, missing, strict=True):
        channel[mask] = 0.0
    return [f"{count} NaN voxels were set to 0, as the plan's data.nan says"] if count else []


def _along_ras(array: NDArray[Any], original: Geometry) -> NDArray[Any]:
    """Return an array with its axes permuted and flipped to run along R, A, S; a copy unless they do already."""
    return np.ascontiguousarray(apply_orientation(array, io_orientation(original.affine.numpy())))


def _plans_grid(original: Geometry, data: Data) -> tuple[Geometry, Geometry]:
    """Return the grid of the image's axes along R, A, S, and the plan's grid; MONAI computes both, without voxels."""
    nothing = MetaTensor(torch.zeros(1).expand(1, *original.shape), affine=original.affine)
    oriented = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")), lazy=True)(nothing)
    grids = [_pending(oriented)]
    grids.append(_pending(Spacing(pixdim=data.spacing_mm, padding_mode="border", lazy=True)(oriented)))
    return grids[0], grids[1]


def _pending(volume: MetaTensor) -> Geometry:
    height, width, depth = (int(side) for side in volume.peek_pending_shape())
    affine: Tensor = torch.as_tensor(volume.peek_pending_affine())
    return Geometry((height, width, depth), affine.double().cpu())


def _normalise(channel: Tensor, data: Data) -> None:
    """Normalise one channel (H, W, D) in place, slab by slab."""
    lower: Any = data.intensity.lower
    upper: Any = data.intensity.upper
    if data.intensity.kind == "percentiles":
        lower, upper = percentile(channel, lower), percentile(channel, upper)
    scale = ScaleIntensityRange(a_min=lower, a_max=upper, b_min=0.0, b_max=1.0, clip=True)
    for slab in _slabs(channel):
        slab.copy_(torch.as_tensor(scale(slab), dtype=torch.float32))
    if data.intensity.kind == "percentiles":
        mean, deviation = channel.mean().item(), channel.std(unbiased=False).item()
        for slab in _slabs(channel):
            slab.copy_((slab - mean) / (deviation or 1.0))


def _slabs(channel: Tensor) -> list[Tensor]:
    return [channel[row : row + SLAB_ROWS] for row in range(0, len(channel), SLAB_ROWS)]


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


def _read_prepared(
    path: Path, case_id: str, data: Data, memory_gb: float | None, check: Callable[[Geometry], None]
) -> Scan | None:
    try:
        with safe_open(path, framework="pt") as file:
            x, y, z = file.get_tensor("original_shape").tolist()
            original = Geometry((x, y, z), file.get_tensor("original_affine"))
            if memory_gb is not None:
                channels = file.get_slice("image").get_shape()[0]
                check_memory(case_id, [original] * channels, data.spacing_mm, memory_gb)
            check(original)
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            notes = tuple(json.loads((file.metadata() or {}).get("notes", "[]")))
    except (OSError, SafetensorError):
        return None
    image, label = kept["image"], kept.get("label")
    return Scan(case_id, image, label, Geometry(_shape(image[0]), kept["grid_affine"]), original, notes)
