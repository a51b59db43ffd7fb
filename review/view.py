"""A scan as the page shows it: radiological orientation, 16-bit slices along any axis, three windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from review.masks import Mask
from semisam_core.data.cases import Case
from semisam_core.data.geometry import AxisChange, Geometry, axis_change
from semisam_core.data.nifti import open_nifti
from semisam_core.plan_sections.task import Intensity

_LPS = Geometry((1, 1, 1), torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)))
AXES = ("sagittal", "coronal", "axial")
STEPS = 65535  # of a shown value
_THICK = 1.3  # a scan whose voxels are longer along one axis than this was acquired in slices across it


@dataclass(frozen=True)
class Window:
    """The intensities between which a scan is shown, in its own units."""

    name: str
    lower: float
    upper: float


class View:
    """One scan on axes that run to the patient's left, back and head, which are those of the page.

    Args:
        case: its files.
        channel: which of them is shown.
        intensity: how the plan normalises; decides on the windows.
        mask: (X, Y, Z), the pseudo-label, whose surroundings make a window.

    Attributes:
        shape: voxels to the left, the back and the head.
        spacing_mm: of these axes.
        lower: the intensity of the shown value 0.
        upper: the intensity of the shown value `STEPS`.
        windows: three.
        axis: the axis across which the scan was acquired, 0 to 2: slices along it are shown first.

    Raises:
        CaseError: the image cannot be read.
    """

    def __init__(self, case: Case, channel: int, intensity: Intensity, mask: Mask) -> None:
        volume = open_nifti(case.images[channel], case.id, "image")
        self._change = axis_change(volume.geometry, _LPS)
        grid = self._change.geometry(volume.geometry)
        self._back: AxisChange = axis_change(grid, volume.geometry)
        self.shape, self.spacing_mm = grid.shape, grid.spacing_mm
        values = np.nan_to_num(self._change.array(volume.voxels()), nan=0.0, posinf=0.0, neginf=0.0)
        self.lower, self.upper = float(values.min()), float(values.max())
        self.windows = _windows(values, self._change.array(mask) > 0, intensity)
        scale = STEPS / (self.upper - self.lower) if self.upper > self.lower else 0.0
        self._values = np.empty(values.shape, dtype="<u2")
        for row in range(len(values)):
            self._values[row] = np.rint((values[row] - self.lower) * scale)
        thick = [side >= _THICK * min(self.spacing_mm) for side in self.spacing_mm]
        self.axis = int(np.argmax(self.spacing_mm)) if sum(thick) == 1 else 2

    def image_slice(self, axis: int, number: int) -> bytes:
        """Return one slice, row by row from the top left corner, as unsigned 16-bit numbers, little-endian.

        Axial slices have the patient's right on the left and the front on top; coronal ones the right on the left and
        the head on top; sagittal ones the front on the left and the head on top.

        Raises:
            IndexError: there is no such slice.
        """
        if not 0 <= axis < 3 or not 0 <= number < self.shape[axis]:
            raise IndexError("there is no such slice")
        plane = self._values.take(number, axis)  # (left or back, back or head)
        rows = plane.T if axis == 2 else plane.T[::-1]
        return np.ascontiguousarray(rows).tobytes()

    def to_page(self, mask: Mask) -> NDArray[np.uint8]:
        """Return a mask (X, Y, Z) as the page has it: (head, back, left), so that the axis to the left is fastest."""
        return np.ascontiguousarray(self._change.array(mask).transpose(2, 1, 0))

    def from_page(self, mask: NDArray[np.uint8]) -> Mask:
        """Return the page's mask on the scan's own axes: (X, Y, Z)."""
        return self._back.array(mask.transpose(2, 1, 0))

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """Voxels to the head, the back and the left."""
        return self.shape[2], self.shape[1], self.shape[0]


def _windows(values: NDArray[np.float32], inside: NDArray[np.bool_], intensity: Intensity) -> tuple[Window, ...]:
    sample = values[tuple(slice(None, None, max(1, side // 64)) for side in values.shape)]
    low, high = (float(each) for each in np.percentile(sample, [0.5, 99.5]))
    wide = Window("wide", low, high)
    if intensity.kind == "window":
        plans = Window("plan", intensity.lower, intensity.upper)
    else:
        low, high = (float(each) for each in np.percentile(sample, [10, 98]))
        plans = Window("contrast", low, high)
    target = values[inside] if inside.any() else sample
    middle, reach = float(target.mean()), max(3 * float(target.std()), 1e-3 * (high - low), 1e-6)
    return tuple(
        each if each.upper > each.lower else Window(each.name, each.lower, each.lower + 1)
        for each in (wide, plans, Window("target", middle - reach, middle + reach))
    )
