"""Masks on a scan's own grid: from a stored pseudo-label, and to and from label files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from release.outputs import nifti_bytes
from semisam_core.data.cases import Case, Role
from semisam_core.data.geometry import Geometry
from semisam_core.data.labels import class_indices
from semisam_core.data.nifti import open_nifti
from semisam_core.data.scans import Scan, load_original_label, resample
from semisam_core.errors import CaseError
from semisam_core.plan import Plan
from semisam_core.plan_sections.task import Task
from semisam_core.pseudo_labels.store import StoredPseudoLabel

Mask = NDArray[np.uint8]
"""(X, Y, Z) of class indices (0 background, k the plan's k-th class), on the grid of the scan's image file."""


def mask_of(label: StoredPseudoLabel, scan: Scan) -> Mask:
    """Return the mask that a pseudo-label's target makes on the scan's own grid; refused classes are empty.

    Raises:
        CaseError: the pseudo-label's file is gone or damaged.
    """
    best = torch.full(scan.original.shape, 0.5)
    mask = torch.zeros(scan.original.shape, dtype=torch.uint8)
    for k in range(label.target.shape[0]):
        target = label.target[slice(k, k + 1), :].float()
        probability = resample(target, scan.grid, scan.original)[0]
        wins = probability > best
        best[wins], mask[wins] = probability[wins], k + 1
    return mask.numpy()


def label_bytes(mask: Mask, grid: Geometry, task: Task, image: Path) -> bytes:
    """Return the content of a label file (.nii.gz): the plan's values, of a union the first, in the image's geometry.

    Args:
        mask: class indices.
        grid: the image's.
        task: which value marks which class.
        image: the scan's NIfTI file, whose geometry fields are taken over.
    """
    values = [0, *(each.label_values[0] for each in task.classes)]
    return nifti_bytes(np.array(values, dtype=np.uint8)[mask], grid, image)


def read_mask(path: Path, case: Case, plan: Plan) -> tuple[Mask, Geometry]:
    """Read a label file of a case and check it as every label of the site is checked.

    Raises:
        CaseError: it is unreadable, does not lie on the image, or has values outside the plan's classes.
    """
    labeled = Case(case.id, case.images, path, Role.LABELED)
    found, grid = load_original_label(labeled, plan)
    return found.numpy(), grid


def check_mask(mask: Mask, grid: Geometry, task: Task, case: str) -> None:
    """Check that a mask fits a scan and a task.

    Raises:
        CaseError: another shape, or a number that is no class.
    """
    if mask.shape != grid.shape:
        raise CaseError(f"{case}: the mask has shape {mask.shape}, the image has {grid.shape}.")
    if int(mask.max(initial=0)) > len(task.classes):
        raise CaseError(f"{case}: the mask has the class {int(mask.max())}; the plan has {len(task.classes)}.")


def stored_mask(path: Path, task: Task) -> Mask:
    """Return a mask that the store keeps, as class indices.

    Raises:
        CaseError: it is unreadable, or has values outside the task's classes.
    """
    return class_indices(open_nifti(path, path.name, "label").voxels(), task, path.name)[0].numpy()
