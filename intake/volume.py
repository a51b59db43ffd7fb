"""What every reader gives: one volume in memory, whatever files it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from semisam_core.data.geometry import Geometry
from semisam_core.errors import SemiSAMError


class IntakeError(SemiSAMError):
    """A file or series cannot be taken. The message says which, why, and what is accepted; it stays at the site."""


@dataclass(frozen=True)
class Volume:
    """A scan or a label map.

    Attributes:
        voxels: (X, Y, Z), along the axes of `geometry`; integers for labels.
        geometry: shape, and affine from voxels to millimetres (RAS+).
        notes: sentences on conversions, such as a tilted gantry that was straightened.
    """

    voxels: NDArray[Any]
    geometry: Geometry
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelVolume:
    """A label map with the names of its values, where its format has names.

    Attributes:
        volume: integers; 0 is background.
        names: value -> name of the segment or region of interest; empty for formats without names.
    """

    volume: Volume
    names: Mapping[int, str]
