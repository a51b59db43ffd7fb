"""Write arrays as NIfTI on the grid of the scan that they belong to."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
from numpy.typing import NDArray

from intake.guards import inflated_prefix
from release.inputs import Input
from semisam_core.data.geometry import Geometry
from semisam_core.files import write_atomically

_SCANNER = 1  # NIfTI's code for coordinates of the scanner
_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540  # of a header, which is what its first field says
_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def write_nifti(path: Path, array: NDArray[Any], grid: Geometry, source: Path | None) -> None:
    """Write an array as NIfTI, atomically: `nifti_bytes` says how."""
    write_atomically(path, nifti_bytes(array, grid, source))


def nifti_bytes(array: NDArray[Any], grid: Geometry, source: Path | None) -> bytes:
    """Return a .nii.gz file's content; the same array gives the same bytes.

    Nothing but geometry is taken over from the scan's header: its texts may tell who the patient is.

    Args:
        array: (X, Y, Z).
        grid: where its voxels lie.
        source: the scan's NIfTI file, whose geometry fields are taken over bit by bit; None for other formats.
    """
    if source is not None:
        kind, theirs = _header(source)
        header = kind.header_class()
        for field in _GEOMETRY:
            header[field] = theirs[field]
        header.set_data_dtype(array.dtype)
        file = kind(array, None, header)
    else:
        file = nib.Nifti1Image(array, None)
        for setter in (file.set_qform, file.set_sform):
            setter(grid.affine.numpy(), _SCANNER)
        file.header.set_xyzt_units("mm")
    return gzip.compress(file.to_bytes(), 5, mtime=0)


def _header(path: Path) -> tuple[Any, Any]:
    """Return the class and the header of a NIfTI file that was read before; its extensions, of any size, are not read.

    Raises:
        IntakeError: the gzip file is damaged.
    """
    if path.name.lower().endswith(".gz"):
        raw = inflated_prefix(path, _NIFTI2_BYTES)
    else:
        with path.open("rb") as file:
            raw = file.read(_NIFTI2_BYTES)
    if _NIFTI2_BYTES in (int.from_bytes(raw[:4], order) for order in ("little", "big")):
        return nib.Nifti2Image, nib.Nifti2Header(raw, check=False)
    return nib.Nifti1Image, nib.Nifti1Header(raw[:_NIFTI1_BYTES], check=False)


def default_format(scan: Input) -> str:
    """Return `dicom-seg` for a DICOM series, otherwise `nifti`."""
    return "nifti" if scan.series is None else "dicom-seg"
