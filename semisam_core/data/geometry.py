"""Geometry of voxel arrays: where they lie in the patient, and whether two of them share a grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray
from torch import Tensor

from semisam_core.errors import CaseError

CORNER_TOLERANCE_VOXELS = 0.25
"""Largest distance between corners at which two grids count as the same.

A quarter of a voxel leaves every voxel's nearest neighbour unambiguous. Headers of the same scan differ by less: by
about a tenth of a voxel if a program stored the rotation as a float32 quaternion only.
"""


@dataclass(frozen=True)
class Geometry:
    """A voxel array's shape (X, Y, Z) and its 4x4 float64 affine from voxels to millimetres (RAS+)."""

    shape: tuple[int, int, int]
    affine: Tensor

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of a voxel along each array axis."""
        lengths = torch.linalg.norm(self.affine[:3, :3], dim=0)
        return (float(lengths[0]), float(lengths[1]), float(lengths[2]))

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Length of the array along each of its axes."""
        x, y, z = (side * step for side, step in zip(self.shape, self.spacing_mm, strict=True))
        return (x, y, z)

    @property
    def axes(self) -> str:
        """The anatomical directions closest to the array axes, such as "RAS" or "PIR"."""
        return "".join(nib.aff2axcodes(self.affine.numpy()))


@dataclass(frozen=True)
class AxisChange:
    """A permutation and flips of array axes.

    Attributes:
        orientation: (3, 2), in nibabel's form: the new position of each axis, and 1 or -1 for its direction.
    """

    orientation: NDArray[np.float64]

    def geometry(self, before: Geometry) -> Geometry:
        """Return the geometry of the changed array; every voxel stays where it is in the patient."""
        places = self.orientation[:, 0].astype(int)
        x, y, z = (before.shape[int(np.flatnonzero(places == axis)[0])] for axis in range(3))
        affine = before.affine.numpy() @ inv_ornt_aff(self.orientation, before.shape)
        return Geometry((x, y, z), torch.from_numpy(affine))

    def array(self, before: NDArray[Any]) -> NDArray[Any]:
        """Return the changed array (X, Y, Z)."""
        return np.ascontiguousarray(apply_orientation(before, self.orientation))


def axis_change(source: Geometry, target: Geometry) -> AxisChange:
    """Return the permutation and flips that bring the axes of `source` closest to those of `target`."""
    relative = np.linalg.inv(target.affine.numpy()) @ source.affine.numpy()
    return AxisChange(io_orientation(relative))


def corner_distance(first: Geometry, second: Geometry) -> tuple[float, float]:
    """Return the largest distance between matching corners of two grids of one shape.

    Returns:
        The distance in voxels of the first grid, and in millimetres.
    """
    corners = torch.tensor(
        [[*corner, 1.0] for corner in product(*((-0.5, side - 0.5) for side in first.shape))], dtype=torch.float64
    )
    apart_mm = (corners @ (second.affine - first.affine).T)[:, :3]  # (8, 3)
    apart_voxels = torch.linalg.solve(first.affine[:3, :3], apart_mm.T)
    return float(apart_voxels.norm(dim=0).max()), float(apart_mm.norm(dim=1).max())


def check_same_grid(case_id: str, what: str, expected: Geometry, found: Geometry) -> None:
    """Check that a label or channel lies on its image's grid.

    Raises:
        CaseError: shapes differ, or a corner lies more than `CORNER_TOLERANCE_VOXELS` from the image's.
    """
    if expected.shape != found.shape:
        raise CaseError(f"{case_id}: the {what} has shape {found.shape}, the image has {expected.shape}.")
    voxels, mm = corner_distance(expected, found)
    if voxels > CORNER_TOLERANCE_VOXELS:
        raise CaseError(
            f"{case_id}: the {what} does not lie on the image: their corners are up to {voxels:.3g} voxels ({mm:.3g} "
            f"mm) apart; accepted are {CORNER_TOLERANCE_VOXELS:g} voxels. Export both from the same series."
        )
