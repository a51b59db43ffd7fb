"""Map the values of label files to class indices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semisam_core.errors import CaseError
from semisam_core.plan_sections.task import Task

ROUNDING_TOLERANCE = 0.02
"""Largest distance from a whole number at which a value is rounded to it.

Labels stored with a scale factor come back as 1.00002 or 1.00392 for 1. Interpolated labels take values all over the
range between two labels.
"""


def class_indices(array: NDArray[np.float32], task: Task, case_id: str) -> tuple[Tensor, tuple[str, ...]]:
    """Map the values of a label file to class indices.

    Args:
        array: (X, Y, Z) values as read from the file.
        task: which value marks which class, and whether other whole numbers are background.
        case_id: for messages.

    Returns:
        (X, Y, Z) uint8 of class indices (0 background, k the plan's k-th class), and a note if values were rounded.

    Raises:
        CaseError: a value marks no class of the plan, or lies between whole numbers.
    """
    classes = enumerate(task.classes, start=1)
    accepted = {0: 0} | {value: k for k, target in classes for value in target.label_values}
    values = np.unique(np.concatenate([np.unique(plane) for plane in array]))  # plane by plane: sorting copies
    with np.errstate(invalid="ignore"):  # NaN and infinity are no whole numbers either
        whole = np.abs(values - np.rint(values)) <= ROUNDING_TOLERANCE
    known = whole & np.isin(np.rint(values), sorted(accepted))
    if task.ignore_other_values:
        known |= whole & (np.rint(values) >= 1)
    if not known.all():
        raise CaseError(_foreign(values[~known], bool(whole[~known].all()), sorted(accepted), case_id))
    off = values[values != np.rint(values)]
    rounded = np.rint(array) if len(off) else array
    indices = np.zeros(array.shape, np.uint8)
    for value, index in accepted.items():
        if index:
            indices[rounded == value] = index
    notes = (f"label values such as {_shown(off[:1])} were rounded to whole numbers",) if len(off) else ()
    return torch.from_numpy(indices), notes


def _foreign(values: NDArray[np.float32], whole: bool, accepted: list[int], case_id: str) -> str:
    more = ", ..." if len(values) > 5 else ""
    said = f"{case_id}: the label has the values {_shown(values[:5])}{more}; the plan's classes accept {accepted}."
    if whole:
        return said
    return f"{said} Values between whole numbers come from interpolation: resample labels with nearest neighbour."


def _shown(values: NDArray[np.float32]) -> str:
    """Return values with enough digits to tell them from whole numbers."""
    return ", ".join(str(value).removesuffix(".0") for value in values)
