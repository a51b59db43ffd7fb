"""Read the h5 releases of the semi-supervised papers: datasets `image` and `label`, without any geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from intake.guards import LIMITS, Limits, check_file, check_shape, shown
from intake.volume import IntakeError, LabelVolume, Volume
from semisam_core.data.geometry import Geometry


def read_h5(
    path: Path, spacing_mm: tuple[float, float, float] | None, limits: Limits = LIMITS
) -> tuple[Volume, LabelVolume | None]:
    """Read one case: left atrium (UA-MT), ACDC or BraTS.

    Args:
        path: the file.
        spacing_mm: voxel size along the array's axes; the files have none.
        limits: largest file and volume.

    Raises:
        IntakeError: no spacing is given, or the file has no 3D dataset `image`, or one that lies in another file.
    """
    if spacing_mm is None or not all(np.isfinite(spacing_mm)) or min(spacing_mm) <= 0:
        raise IntakeError(f"{path.name!a}: h5 files have no voxel size; give it in mm for each axis of the array.")
    check_file(path, limits)
    try:
        with h5py.File(path, "r") as file:
            image = _array(file, "image", path, limits)
            if image is None:
                raise IntakeError(f"{path.name!a}: it has no dataset named image.")
            label = _array(file, "label", path, limits)
    except (IntakeError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - h5py raises many kinds for a bad file
        raise IntakeError(f"{path.name!a}: it cannot be read ({type(error).__name__}: {shown(error)}).") from None
    x, y, z = image.shape
    affine = torch.diag(torch.tensor([*spacing_mm, 1.0], dtype=torch.float64))
    grid = Geometry((x, y, z), affine)
    volume = Volume(image.astype(np.float32), grid)
    if label is None:
        return volume, None
    whole = np.rint(label)
    if label.shape != image.shape or np.abs(label - whole).max() > 1e-3 or whole.min() < 0 or whole.max() > 65535:
        raise IntakeError(f"{path.name!a}: its label has another shape than the image, or is not of whole numbers.")
    return volume, LabelVolume(Volume(whole.astype(np.uint16), grid), {})


def _array(file: Any, name: str, path: Path, limits: Limits) -> Any:
    link = file.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise IntakeError(f"{path.name!a}: its dataset {name} is a link to elsewhere, which is not followed.")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise IntakeError(f"{path.name!a}: its dataset {name} lies in another file, which is not read.")
    if dataset.ndim != 3 or dataset.dtype.kind not in "iufb":
        raise IntakeError(
            f"{path.name!a}: its dataset {name} has {dataset.ndim} axes; a 3D array of numbers is expected."
        )
    check_shape(path, tuple(dataset.shape), limits)
    array = np.asarray(dataset[()], dtype=np.float64 if name == "label" else np.float32)
    if not np.isfinite(array).all():
        raise IntakeError(f"{path.name!a}: its dataset {name} has values that are not finite.")
    return array
