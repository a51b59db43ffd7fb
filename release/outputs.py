"""Write arrays as NIfTI on the grid of the scan that they belong to."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
from numpy.typing import NDArray

from release.inputs import Input
from semisam_core.data.geometry import Geometry
from semisam_core.files import write_atomically

_SCANNER = 1  # NIfTI's code for coordinates of the scanner
_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def write_nifti(path: Path, array: NDArray[Any], grid: Geometry, source: Path | None) -> None:
    """Write an array as NIfTI, atomically; the same array gives the same bytes.

    Nothing but geometry is taken over from the scan's header: its texts may tell who the patient is.

    Args:
        path: ends in .nii.gz.
        array: (X, Y, Z).
        grid: where its voxels lie.
        source: the scan's NIfTI file, whose geometry fields are taken over bit by bit; None for other formats.
    """
    if source is not None:
        theirs: Any = nib.load(source).header
        kind = nib.Nifti2Image if int(theirs["sizeof_hdr"]) == 540 else nib.Nifti1Image
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
    write_atomically(path, gzip.compress(file.to_bytes(), 5, mtime=0))


def default_format(scan: Input) -> str:
    """Return `dicom-seg` for a DICOM series, otherwise `nifti`."""
    return "nifti" if scan.series is None else "dicom-seg"
