"""Hand a scan and its pseudo-label to 3D Slicer or ITK-SNAP, and take the corrected mask back."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np

from client.reviews import ReviewStore
from intake.dicom.labels import read_label
from intake.dicom.series import DicomSeries, grid_of
from release.dicom_seg import write_dicom_seg
from release.inputs import find_inputs
from review.masks import Mask, label_bytes, read_mask
from review.reviewing import Opened, ReviewError
from semisam_core.data.geometry import axis_change, check_same_grid
from semisam_core.errors import SemiSAMError
from semisam_core.files import write_atomically
from semisam_core.plan import Plan

EXCHANGE, MASK = "exchange", "mask.nii.gz"


def exchange_folder(store: ReviewStore, opened: Opened) -> Path:
    """Return the folder in the site's storage where a pseudo-label is exchanged with other programs."""
    return store.folder / EXCHANGE / opened.sha256[:16]


def hand_over(opened: Opened, folder: Path, plan: Plan) -> list[Path]:
    """Write the scan's channels and its mask as NIfTI; a mask that is there already, perhaps corrected, is kept.

    Args:
        opened: the scan.
        folder: where to write.
        plan: its channels and classes.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    files = []
    for name, image in zip(plan.task.channels, opened.case.images, strict=True):
        packed = image.name.lower().endswith(".gz")
        target = folder / f"image-{name}.nii.gz"
        if packed:
            shutil.copyfile(image, target)
        else:
            write_atomically(target, gzip.compress(image.read_bytes(), 1, mtime=0))
        files.append(target)
    if not (folder / MASK).exists():
        write_atomically(folder / MASK, label_bytes(opened.mask, opened.grid, plan.task, opened.case.images[0]))
    return [*files, folder / MASK]


def take_back(opened: Opened, path: Path, plan: Plan) -> Mask:
    """Read a corrected mask, a NIfTI file, checked as labels of the site are.

    Raises:
        CaseError: it is unreadable, does not lie on the image, or has values outside the plan's classes.
    """
    return read_mask(path, opened.case, plan)[0]


def series_of_scan(opened: Opened, folder: Path, plan: Plan) -> DicomSeries:
    """Return the DICOM series in a folder that a scan was made from, judged by its grid.

    Raises:
        ReviewError: none has the scan's grid, or several do.
    """
    found, _ = find_inputs(folder, plan, "dicom", {})
    fitting = [each.series for each in found if each.series is not None and _fits(opened, each.series)]
    if len(fitting) != 1:
        raise ReviewError(
            f"{opened.case.id}: {len(fitting)} of {len(found)} series in the folder have the grid of this scan; one is "
            "expected. Name the folder of the series that it was imported from."
        )
    return fitting[0]


def hand_over_seg(opened: Opened, series: DicomSeries, path: Path, plan: Plan) -> None:
    """Write the pseudo-label as DICOM SEG over the series that the scan was made from. It names the patient.

    Raises:
        IntakeError: the series cannot be referred to.
        OSError: the file cannot be written.
    """
    grid = grid_of(series)
    values = np.array([0, *(each.label_values[0] for each in plan.task.classes)], dtype=np.uint8)
    mask = axis_change(opened.grid, grid).array(values[opened.mask])
    write_dicom_seg(path, mask, grid, series, plan.task, [opened.source or opened.sha256])


def take_back_seg(opened: Opened, series: DicomSeries, path: Path, plan: Plan) -> Mask:
    """Read a corrected DICOM SEG, checked as on import; segments are told by the names of the plan's classes.

    Raises:
        IntakeError: it is damaged, or has none of the classes, or two overlap.
        CaseError: it does not lie on the scan.
    """
    label = read_label(path, "SEG", series, plan.class_names)
    change = axis_change(label.volume.geometry, opened.grid)
    check_same_grid(opened.case.id, "DICOM SEG", opened.grid, change.geometry(label.volume.geometry))
    table = np.zeros(65536, dtype=np.uint8)
    for value, name in label.names.items():
        table[value] = 1 + [each.casefold() for each in plan.class_names].index(name.casefold())
    return change.array(table[label.volume.voxels])


def _fits(opened: Opened, series: DicomSeries) -> bool:
    try:
        grid = grid_of(series)
        change = axis_change(grid, opened.grid)
        check_same_grid(opened.case.id, "series", opened.grid, change.geometry(grid))
    except SemiSAMError:
        return False
    return True
