"""How much memory a scan takes, judged by the sizes of its grids before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil

from release.inputs import maps_of
from semisam_core.data.geometry import Geometry
from semisam_core.data.nifti import by_axis, planned_shape
from semisam_core.errors import CaseError
from semisam_core.plan import Plan

_BASE_GB = 0.5  # blocks, windows and the network's activations
_SHARE = 0.8  # of the memory that is free, if nothing else is said


def free_gb() -> float:
    """Return the memory that prediction may take on this machine if nobody says otherwise."""
    return _SHARE * psutil.virtual_memory().available / 1e9


def needed_gb(grid: Geometry, plans: Sequence[Plan], uncertainty: bool) -> float:
    """Return about how much memory it takes to segment a scan.

    Measured with `benchmarks/predict_overhead.py --large`. Per voxel of the scan: its channels while they are turned
    and resampled, the result, and what DICOM SEG takes to be written. Per voxel of a plan's grid: the places to sample
    and the channels while they are normalised; and the probabilities of the rows that a window is long.

    Args:
        grid: the scan's own.
        plans: of the models.
        uncertainty: whether maps of it are made.
    """
    channels, classes = len(plans[0].task.channels), 1 + len(plans[0].task.classes)
    maps = len(maps_of(len(plans))) if uncertainty else 0
    needed = math.prod(grid.shape) * (16 * channels + 8 + 8 * maps)
    for plan in plans:
        height, width, depth = planned_shape(grid, plan.data.spacing_mm)
        rows = min(height, 2 * plan.data.patch[0])
        needed += height * width * depth * (28 + 16 * channels) + rows * width * depth * 4 * (classes + 1)
    return needed / 1e9 + _BASE_GB


def check_memory(grid: Geometry, plans: Sequence[Plan], uncertainty: bool, name: str, memory_gb: float) -> None:
    """Check that a scan can be segmented within this much memory.

    Raises:
        CaseError: it cannot.
    """
    if (needed := needed_gb(grid, plans, uncertainty)) > memory_gb:
        on_plan = " or ".join(dict.fromkeys(by_axis(planned_shape(grid, plan.data.spacing_mm)) for plan in plans))
        raise CaseError(
            f"{name}: to segment it would take about {needed:.3g} GB of memory, {memory_gb:.3g} are allowed "
            f"(--memory-gb). It has {by_axis(grid.shape)} voxels of {by_axis(grid.spacing_mm)} mm, and {on_plan} on "
            "the model's grid. Correct the voxel size if it is wrong, use fewer models, or allow more."
        )
