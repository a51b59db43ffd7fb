"""Read NIfTI, NRRD and MetaImage files: header first, within bounds."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from intake.guards import LIMITS, Limits, check_affine, check_file, check_shape, inflated_prefix, shown
from intake.volume import IntakeError, LabelVolume, Volume
from semisam_core.data.geometry import Geometry
from semisam_core.data.names import nifti_suffix
from semisam_core.data.nifti import load_bounded

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
_DETACHED = (".nhdr", ".mhd")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNITS = {1: 1000.0, 3: 0.001}  # NIfTI codes of metres and micrometres; all else is taken as mm
_HEADER_BYTES = 1 << 20
_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_NRRD_DATA = re.compile(rb"(?im)(?:^|\r)[ \t]*data[ \t]*file[ \t]*:([^\r\n]*)")
_META_DATA = re.compile(rb"(?i)elementdatafile[ \t]*[=:]?([^\r\n]*)")
_META_FIELD = re.compile(rb"[ \t]*[A-Za-z][A-Za-z0-9_ \t]{0,200}[=:][^\0]{0,3000}")


def volume_suffix(name: str) -> str | None:
    """Return the suffix of a file name, as it is written, if volumes can be read from such files."""
    lower = name.lower()
    found = nifti_suffix(name)
    return found or next((name[-len(suffix) :] for suffix in ITK_SUFFIXES if lower.endswith(suffix)), None)


def detached(path: Path) -> list[Path]:
    """Return the files beside a header (.nhdr, .mhd) whose names stand in it: one of them has the voxels.

    Raises:
        OSError: the header, or its folder, cannot be read.
    """
    if not path.name.lower().endswith(_DETACHED):
        return []
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    beside = (each for each in path.parent.iterdir() if each != path and os.fsencode(each.name) in head)
    return sorted(each for each in beside if each.is_file() and not each.is_symlink())


def read_volume(path: Path, limits: Limits = LIMITS) -> Volume:
    """Read a 3D image: float32.

    Raises:
        IntakeError: it is no readable 3D image within the limits.
    """
    array, geometry, notes = _read(path, limits)
    if array.ndim != 3:
        raise IntakeError(f"{path.name!a}: it has shape {array.shape}; a 3D volume is expected, one file per channel.")
    return Volume(array.astype(np.float32, copy=False), geometry, notes)


def read_channels(path: Path, limits: Limits = LIMITS) -> list[Volume]:
    """Read a 3D image, or a 4D one whose last axis counts channels.

    Raises:
        IntakeError: it is neither.
    """
    array, geometry, notes = _read(path, limits)
    parts = [array] if array.ndim == 3 else [array[..., k] for k in range(array.shape[3])]
    return [Volume(np.ascontiguousarray(part, dtype=np.float32), geometry, notes) for part in parts]


def read_labels(path: Path, limits: Limits = LIMITS) -> LabelVolume:
    """Read a 3D label map: uint16, no names.

    Raises:
        IntakeError: it is no readable 3D volume of whole numbers from 0 to 65535.
    """
    array, geometry, notes = _read(path, limits)
    if array.ndim != 3:
        raise IntakeError(f"{path.name!a}: the label has shape {array.shape}; a 3D volume is expected.")
    whole = np.rint(array)
    if not np.isfinite(array).all() or np.abs(array - whole).max() > 1e-3 or whole.min() < 0 or whole.max() > 65535:
        raise IntakeError(f"{path.name!a}: the label has values that are no whole numbers from 0 to 65535.")
    return LabelVolume(Volume(whole.astype(np.uint16), geometry, notes), {})


def _read(path: Path, limits: Limits) -> tuple[NDArray[Any], Geometry, tuple[str, ...]]:
    check_file(path, limits)
    suffix = (volume_suffix(path.name) or "").lower()
    try:
        if suffix in ITK_SUFFIXES:
            return _itk(path, limits)
        if suffix:
            return _nifti(path, limits)
    except (IntakeError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - nibabel, zlib and ITK raise many kinds for a bad file
        raise IntakeError(f"{path.name!a}: it cannot be read ({type(error).__name__}: {shown(error)}).") from None
    raise IntakeError(f"{path.name!a}: accepted are .nii, .nii.gz, {', '.join(ITK_SUFFIXES)}.")


def _nifti(path: Path, limits: Limits) -> tuple[NDArray[Any], Geometry, tuple[str, ...]]:
    if path.name.lower().endswith(".gz"):
        inflated_prefix(path, 348)
    file: Any = load_bounded(path)
    if not isinstance(file, nib.Nifti1Image | nib.Nifti2Image):
        raise IntakeError(f"{path.name!a}: it is a {type(file).__name__}; a NIfTI volume in one file is expected.")
    dtype = file.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise IntakeError(f"{path.name!a}: its voxels are in colour or complex; one real number each is expected.")
    shape = list(file.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    _check_dimensions(path, shape, limits)
    affine = np.array(file.affine, dtype=np.float64)
    notes: tuple[str, ...] = ()
    if (factor := _UNITS.get(int(file.header["xyzt_units"]) & 7)) is not None:
        affine[:3] *= factor
        notes = ("sizes in the header were converted to mm",)
    check_affine(path, affine)
    array = np.asarray(file.dataobj, dtype=np.float32).reshape(shape)
    return array, Geometry((shape[0], shape[1], shape[2]), torch.from_numpy(affine)), notes


def _itk(path: Path, limits: Limits) -> tuple[NDArray[Any], Geometry, tuple[str, ...]]:
    _refuse_other_files(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(
        _READERS[path.suffix.lower()]
    )  # or ITK would go by content: a DICOM file of that name is read too
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise IntakeError(f"{path.name!a}: it has {reader.GetNumberOfComponents()} values a voxel; one is expected.")
    shape = list(reader.GetSize())
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    _check_dimensions(path, shape, limits)
    sides = len(reader.GetSize())
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(sides, sides)[:3, :3]
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = direction * np.array(reader.GetSpacing()[:3]), reader.GetOrigin()[:3]
    affine = _LPS_TO_RAS @ lps
    check_affine(path, affine)
    array = sitk.GetArrayFromImage(reader.Execute())
    array = np.ascontiguousarray(array.transpose(range(array.ndim)[::-1])).astype(np.float32).reshape(shape)
    return array, Geometry((shape[0], shape[1], shape[2]), torch.from_numpy(affine)), ()


def _check_dimensions(path: Path, shape: list[int], limits: Limits) -> None:
    check_shape(path, tuple(shape), limits)
    if len(shape) not in (3, 4):
        raise IntakeError(f"{path.name!a}: it is {len(shape)}D with shape {tuple(shape)}; a 3D volume is expected.")


def _refuse_other_files(path: Path) -> None:
    """Refuse headers whose voxels lie in another file, which could be any file of this machine.

    Every place that could name one counts, so that blank lines, comments and either separator hide none.

    Raises:
        IntakeError: the header names one elsewhere than beside it, has lines that are no fields, or does not end.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    suffix = path.suffix.lower()
    nrrd = suffix in (".nrrd", ".nhdr")
    (_check_nrrd_header if nrrd else _check_meta_header)(path, head)
    for found in (_NRRD_DATA if nrrd else _META_DATA).finditer(head):
        name = found[1].strip().decode("utf-8", "replace")
        if name.upper() in ("LOCAL", "INTERNAL") and suffix != ".nhdr":
            continue
        beside = name not in ("", ".", "..") and not any(mark in name for mark in "/\\%\0")
        beside = beside and name[0] not in "=:"  # a second separator, which the reader may skip
        attached = suffix in (".nrrd", ".mha")
        if attached or not beside or name.upper().startswith("LIST") or (path.parent / name).is_symlink():
            raise IntakeError(f"{path.name!a}: its voxels are in {shown(name)}; only a file beside the header is read.")


def _check_nrrd_header(path: Path, head: bytes) -> None:
    if len(head) == _HEADER_BYTES and b"\n\n" not in head and b"\n\r\n" not in head:
        raise IntakeError(f"{path.name!a}: its header is longer than {_HEADER_BYTES >> 10} KB.")


def _check_meta_header(path: Path, head: bytes) -> None:
    """Check that each line before the one that names the voxels is a field, as the reader could skip it otherwise."""
    for line in re.split(rb"[\r\n]+", head):
        if _META_DATA.match(line.lstrip(b" \t")):
            return
        if line.strip() and not _META_FIELD.fullmatch(line):
            break
    raise IntakeError(
        f"{path.name!a}: its header has no line ElementDataFile in its first {_HEADER_BYTES >> 10} KB, or other lines "
        "than `name = value` before it."
    )
