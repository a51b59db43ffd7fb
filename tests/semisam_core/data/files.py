"""Write NIfTI files as other programs do, and load them as a site does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from semisam_core.data.cases import Case, find_cases
from semisam_core.data.scans import Scan, load_scan
from tests.conftest import blob, tiny_plan

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def write_volume(
    path: Path,
    volume: NDArray[Any],
    affine: NDArray[Any] = AFFINE,
    units: str = "mm",
    stored_as: type | None = None,
) -> Path:
    """Write a volume; with `stored_as`, nibabel scales it to that type on disk, as other programs do."""
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units(units, "sec")
    if stored_as is not None:
        image.set_data_dtype(stored_as)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_pair(folder: Path, image: Any = None, label: Any = None, affine: NDArray[Any] = AFFINE) -> Path:
    """Write images/a.nii.gz and labels/a.nii.gz into the folder, a blob unless volumes are given."""
    default_image, default_label = blob()
    write_volume(folder / "images" / "a.nii.gz", default_image if image is None else image, affine)
    write_volume(folder / "labels" / "a.nii.gz", default_label if label is None else label, affine)
    return folder


def the_case(folder: Path, channels: int = 1) -> Case:
    """Return the only case of a folder with images and labels."""
    found = find_cases(folder / "images", folder / "labels", channels, None, ())
    assert not found.quarantined
    (case,) = found.cases
    return case


def load(folder: Path, *assignments: str, memory_gb: float | None = None) -> Scan:
    """Find the only case of a folder and load it."""
    plan = tiny_plan(*assignments)
    return load_scan(the_case(folder, len(plan.task.channels)), plan, memory_gb=memory_gb)


def stored_along(volume: NDArray[Any], affine: NDArray[Any], axes: tuple[str, ...]) -> tuple[NDArray[Any], Any]:
    """Return a volume stored along other axes, and the affine that keeps it in place."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    return apply_orientation(volume, change), affine @ inv_ornt_aff(change, volume.shape)
