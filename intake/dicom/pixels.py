"""Decode the pixels of DICOM images, whatever their transfer syntax, in the units that their rescaling gives."""

from __future__ import annotations

from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from pydicom.pixels import apply_modality_lut

from intake.dicom.headers import Slice
from intake.guards import Limits, check_affine, check_shape, shown
from intake.volume import IntakeError, Volume
from semisam_core.data.geometry import Geometry


def read_slice(each: Slice) -> NDArray[np.float32]:
    """Return a single-frame image (rows, columns).

    Raises:
        IntakeError: it cannot be decoded, or has another size than its header says.
    """
    name, header = each.path.name, each.header
    check_shape(each.path, (int(header.Rows), int(header.Columns)))
    try:
        dataset = pydicom.dcmread(each.path)
        stored = np.asarray(dataset.pixel_array)
        if str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME1":
            stored = _inverted(stored, dataset)
        pixels = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - each decoder has its own kinds
        raise IntakeError(f"{name!a}: its pixels cannot be decoded ({type(error).__name__}: {shown(error)}).") from None
    if pixels.shape != (int(header.Rows), int(header.Columns)):
        raise IntakeError(f"{name!a}: it has pixels of shape {pixels.shape}; its header says otherwise.")
    if not np.isfinite(pixels).all():
        raise IntakeError(f"{name!a}: it has pixels that are not finite after rescaling.")
    return pixels


def frames_grid(each: Slice, limits: Limits) -> Geometry:
    """Return the grid of a multi-frame image (columns, rows, frames), without decoding it.

    Raises:
        IntakeError: its frames are not one regular volume.
    """
    check_shape(each.path, (each.frames, int(each.header.Rows), int(each.header.Columns)), limits)
    try:
        found = hd.imread(each.path, lazy_frame_retrieval=True).get_volume_geometry()
        if found is None:
            raise ValueError("positions are not regular")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - highdicom raises many kinds
        raise _no_volume(each, error) from None
    return _grid(each, found)[0]


def read_frames(each: Slice, limits: Limits) -> Volume:
    """Read a multi-frame image whose frames are one regular volume (enhanced CT, MR or PET).

    Raises:
        IntakeError: it is none, or cannot be decoded.
    """
    frames_grid(each, limits)
    try:
        volume = hd.imread(each.path).get_volume(dtype=np.float32)
        array = np.asarray(volume.array)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise _no_volume(each, error) from None
    if array.ndim != 3 or not np.isfinite(array).all():
        raise IntakeError(f"{each.path.name!a}: its frames are in colour or not finite.")
    grid, reversed_slices = _grid(each, volume)
    voxels = array.transpose(2, 1, 0)
    return Volume(np.ascontiguousarray(voxels[:, :, ::-1] if reversed_slices else voxels), grid)


def _grid(each: Slice, found: Any) -> tuple[Geometry, bool]:
    """Return a grid of highdicom's, whose axes are slice, row, column in LPS, as columns, rows, slices in RAS+.

    Slices follow each other along the normal (row x column), as those of single-frame images do; also returned is
    whether highdicom has them the other way round.
    """
    lps = np.asarray(found.affine, dtype=np.float64)[:, [2, 1, 0, 3]]
    z, y, x = (int(side) for side in found.spatial_shape)
    backwards = bool(np.cross(lps[:3, 0], lps[:3, 1]) @ lps[:3, 2] < 0)
    if backwards:
        lps[:3, 3] += (z - 1) * lps[:3, 2]
        lps[:3, 2] *= -1
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    check_affine(each.path, affine)
    return Geometry((x, y, z), torch.from_numpy(affine)), backwards


def _no_volume(each: Slice, error: Exception) -> IntakeError:
    return IntakeError(
        f"{each.path.name!a}: its {each.frames} frames are not one regular volume, or cannot be decoded "
        f"({type(error).__name__}: {shown(error)}). Export it as single-frame images, one series per volume."
    )


def _inverted(stored: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Return stored values with bright and dark exchanged, over the range that their bits allow."""
    bits, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0)) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.asarray(low + high - stored.astype(np.int64))
