"""Open one NIfTI file: check its header before any voxel is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.openers import ImageOpener
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from semisam_core.data.geometry import Geometry, axis_change
from semisam_core.errors import CaseError

SMALLEST_SIDE = 4  # voxels
LONGEST_EXTENT_MM = 3000.0  # a whole-body scan is 2 m
SHORTEST_EXTENT_MM = 5.0  # of the longest side; below, the header has the wrong unit
LARGEST_VOXEL_MM = 50.0
MOST_HEADER_BYTES = 64 << 20  # extensions may hold DICOM headers
_NIFTI2 = (struct.pack("<i", 540), struct.pack(">i", 540))
_UNITS = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # NIfTI codes; 2 is mm, and 0 (unknown) is taken as mm


@dataclass(frozen=True)
class NiftiVolume:
    """A 3D file with a sound header. Its voxels are read on demand.

    Attributes:
        case_id: for messages.
        what: "image" or "label", for messages.
        file: nibabel's image.
        geometry: shape without trailing axes of length one, and the affine in millimetres.
        notes: sentences on conversions.
    """

    case_id: str
    what: str
    file: Any
    geometry: Geometry
    notes: tuple[str, ...]

    def voxels(self) -> NDArray[np.float32]:
        """Read the voxels, scaled as the header says: (X, Y, Z).

        Raises:
            CaseError: the file is truncated or damaged.
        """
        try:
            array = _scaled(self.file.dataobj)
        except Exception as error:  # noqa: BLE001 - nibabel, zlib and gzip raise many kinds for a bad file
            raise _unreadable(self.case_id, self.what, error) from None
        return array.reshape(self.geometry.shape)


def _scaled(data: Any) -> NDArray[np.float32]:
    """Return what `np.asarray(data, dtype=float32)` does; where the header scales, without a float64 copy of all."""
    stored = data.get_unscaled()
    if data.slope == 1 and data.inter == 0:
        return np.asarray(stored, dtype=np.float32)
    array = np.empty(stored.shape, np.float32, order="F")
    for plane in range(stored.shape[-1]):
        part = slice(plane, plane + 1)
        array[..., part] = apply_read_scaling(stored[..., part], np.asanyarray(data.slope), np.asanyarray(data.inter))
    return array


def load_bounded(path: Path) -> Any:
    """Return what `nib.load` does, for a file whose header and extensions are of a bearable size.

    nibabel reads all extensions with the header, and as many bytes as each claims; of a gzip file, inflated ones.

    Raises:
        Exception: of many kinds, for a file that cannot be read.
    """
    with ImageOpener(str(path)) as file:
        size = file.read(4)
        file.seek(0)
        kind = nib.Nifti2Header if size in _NIFTI2 else nib.Nifti1Header
        kind.from_fileobj(_Bounded(file), check=False)
    return nib.load(path)


class _Bounded:
    """The first `MOST_HEADER_BYTES` of a file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        self._check(self._file.tell() + max(size, 0))
        return bytes(self._file.read(max(size, 0)))

    def seek(self, offset: int, whence: int = 0) -> None:
        self._check(offset if whence == 0 else self._file.tell() + offset)
        self._file.seek(offset, whence)

    def _check(self, end: int) -> None:
        if end > MOST_HEADER_BYTES:
            raise ValueError(f"its header and extensions are larger than {MOST_HEADER_BYTES >> 20} MB")


def open_nifti(path: Path, case_id: str, what: str) -> NiftiVolume:
    """Read a file's header and check it.

    Trailing axes of length one are dropped. Sizes in metres or micrometres become millimetres; an unknown unit is taken
    as millimetres. A volume of fewer than four voxels along an axis is refused: it is most often a localizer or a
    single key image, and a 3D network cannot learn from so few slices.

    Raises:
        CaseError: the file is unreadable, in colour, complex, not 3D, too thin, without a usable affine, or of an
            implausible size.
    """
    try:
        file: Any = load_bounded(path)
    except Exception as error:  # noqa: BLE001 - as above
        raise _unreadable(case_id, what, error) from None
    if not isinstance(file, nib.Nifti1Pair):
        raise CaseError(f"{case_id}: the {what} is a {type(file).__name__}; a NIfTI volume is expected.")
    _check_voxel_type(file.get_data_dtype(), case_id, what)
    shape = _spatial_shape(tuple(file.shape), case_id, what)
    affine = np.array(file.affine, dtype=np.float64)
    notes: tuple[str, ...] = ()
    if unit := _UNITS.get(int(file.header["xyzt_units"]) & 7):
        name, factor = unit
        affine[:3] *= factor
        notes = (f"the header of the {what} gives sizes in {name}; they were converted to mm",)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise CaseError(f"{case_id}: the {what} has no usable affine (voxel size and direction).")
    geometry = Geometry(shape, torch.from_numpy(affine))
    check_sizes(geometry, case_id, what)
    return NiftiVolume(case_id, what, file, geometry, notes)


def check_memory(
    case_id: str,
    channels: Sequence[Geometry],
    spacing_mm: Sequence[float] | None,
    memory_gb: float,
    what: str = "image",
) -> None:
    """Check by headers alone that an image fits into memory, as it is stored and on the plan's grid.

    Args:
        case_id: for messages.
        channels: the grids of the image's files.
        spacing_mm: the plan's voxel size along R, A, S; None without a plan.
        memory_gb: the limit of the site's `storage.memory_gb`.
        what: "image" or "label", for messages.

    Raises:
        CaseError: float32 voxels of all channels would take more.
    """
    original = channels[0]
    voxels = max(math.prod(each.shape) for each in channels)
    onto_grid = ""
    if spacing_mm is not None:
        grid = planned_shape(original, spacing_mm)
        voxels = max(voxels, math.prod(grid))
        onto_grid = f"; on the plan's grid its shape would be about {grid}"
    needed_gb = len(channels) * voxels * 4 / 1e9
    if needed_gb > memory_gb:
        raise CaseError(
            f"{case_id}: the {what} would take {needed_gb:.3g} GB of memory, storage.memory_gb allows "
            f"{memory_gb:g}. It has shape {original.shape} and voxels of {by_axis(original.spacing_mm)} mm{onto_grid}. "
            "Correct the voxel size if it is wrong, or raise storage.memory_gb."
        )


def planned_shape(original: Geometry, spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Return about what shape a scan has on a plan's grid (H, W, D), whose voxels have these sides along R, A, S."""
    along_ras = axis_change(original, Geometry(original.shape, torch.eye(4, dtype=torch.float64))).geometry(original)
    x, y, z = (math.ceil(extent / step) for extent, step in zip(along_ras.extent_mm, spacing_mm, strict=True))
    return x, y, z


def by_axis(lengths: Sequence[float]) -> str:
    """Return lengths as "0.7 x 0.7 x 3"."""
    return " x ".join(f"{length:.4g}" for length in lengths)


def _unreadable(case_id: str, what: str, error: Exception) -> CaseError:
    return CaseError(f"{case_id}: the {what} file cannot be read ({type(error).__name__}: {error}).")


def _check_voxel_type(dtype: np.dtype[Any], case_id: str, what: str) -> None:
    if dtype.fields is not None:
        kind = "in colour (RGB)"
    elif dtype.kind == "c":
        kind = "complex"
    else:
        return
    raise CaseError(f"{case_id}: the {what} is {kind}; one real number per voxel is expected. Export it as greyscale.")


def _spatial_shape(shape: tuple[int, ...], case_id: str, what: str) -> tuple[int, int, int]:
    sides = list(shape)
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) != 3:
        raise CaseError(
            f"{case_id}: the {what} is {len(sides)}D with shape {shape}; a 3D volume is expected, one file per channel."
        )
    return sides[0], sides[1], sides[2]


def check_sizes(geometry: Geometry, case_id: str, what: str) -> None:
    """Check that a volume has enough voxels along each axis, and a size that a patient may have.

    Raises:
        CaseError: it has not.
    """
    if min(geometry.shape) < SMALLEST_SIDE:
        raise CaseError(
            f"{case_id}: the {what} has shape {geometry.shape}; at least {SMALLEST_SIDE} voxels per side are needed. "
            "Is it a localizer or a single slice of the series?"
        )
    longest, voxel = max(geometry.extent_mm), max(geometry.spacing_mm)
    if SHORTEST_EXTENT_MM <= longest <= LONGEST_EXTENT_MM and voxel <= LARGEST_VOXEL_MM:
        return
    extent, spacing = (by_axis(lengths) for lengths in (geometry.extent_mm, geometry.spacing_mm))
    raise CaseError(
        f"{case_id}: the {what} measures {extent} mm with voxels of {spacing} mm, which no patient does. Accepted are "
        f"{SHORTEST_EXTENT_MM:g} to {LONGEST_EXTENT_MM:g} mm along the longest side and voxels up to "
        f"{LARGEST_VOXEL_MM:g} mm. Correct the voxel size or the unit in its header."
    )
