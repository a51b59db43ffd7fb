"""Write a segmentation as DICOM SEG, which a PACS shows over the series that it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy import ndimage

from intake.dicom.series import DicomSeries, Stack
from intake.guards import shown
from intake.volume import IntakeError
from release.dicom_terms import terms_of
from semisam_core import __version__
from semisam_core.data.geometry import Geometry
from semisam_core.files import write_atomically
from semisam_core.plan_sections.task import Task

MAKER = "FedSemiSAM"
SERIES_NUMBER = 1000
MOST_FRAMES = 4000  # with empty ones; 4000 frames of 512 x 512 take 1 GB while they are written
_LARGE_ELEMENT = 1 << 20  # bytes of an element beyond which it is read only if it is asked for
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
)


def write_dicom_seg(
    path: Path, labels: NDArray[np.uint8], grid: Geometry, series: DicomSeries, task: Task, models: Sequence[str]
) -> None:
    """Write a segmentation as DICOM SEG that refers to its series, one binary segment a class, atomically.

    It carries the patient's and study's attributes of the series, as a PACS needs. Every segment has a frame for every
    slice, so that the grid is that of the series even where nothing was found; empty frames are left out if there would
    be more than `MOST_FRAMES`. UIDs depend on what the file says (series, models, version, voxels), so the same result
    is the same instance for a PACS, and another one is not.

    Args:
        path: ends in .dcm.
        labels: (columns, rows, slices), as the series was read; values of the task's classes.
        grid: the series' grid.
        series: what was segmented.
        task: names and values of classes.
        models: hashes of the models' tensors.

    Raises:
        IntakeError: the series cannot be referred to.
    """
    multi = series.slices[0].frames > 1
    datasets = [_referable(each.path) for each in (series.slices if multi else series.stack.slices)]
    numbers = np.zeros(256, dtype=np.uint8)
    for number, each in enumerate(task.classes, start=1):
        numbers[each.label_values[0]] = number
    segments = numbers[labels]
    uids = [series.uid, series.part, *models, __version__, hashlib.sha256(segments.tobytes()).hexdigest()]
    try:
        segmentation = hd.seg.Segmentation(
            source_images=datasets,
            pixel_array=_frames(segments, grid) if multi else _slices(segments, series.stack),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(task, models),
            series_instance_uid=generate_uid(entropy_srcs=[*uids, "series"]),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(entropy_srcs=[*uids, "instance"]),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=__version__,
            device_serial_number=_joint(models)[:16],
            series_description=f"{MAKER} {task.name}"[:64],
            content_description=f"Made by a model: weights {_joint(models)[:16]}",
            omit_empty_frames=labels.shape[2] * len(task.classes) > MOST_FRAMES,
        )
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise IntakeError(
            f"no DICOM SEG can refer to this series ({type(error).__name__}: {shown(error)}). Choose --format nifti."
        ) from None
    buffer = BytesIO()
    segmentation.save_as(buffer)
    write_atomically(path, buffer.getvalue())


def check_referable(series: DicomSeries) -> None:
    """Check, before anything is computed, that a DICOM SEG can refer to a series.

    Raises:
        IntakeError: a file lacks the identifiers of its study or of itself.
    """
    for each in series.slices:
        _referable(each.path)


def _descriptions(task: Task, models: Sequence[str]) -> list[hd.seg.SegmentDescription]:
    algorithm = hd.AlgorithmIdentificationSequence(
        name=f"{MAKER} {task.name}"[:64],
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        parameters={f"weights_sha256_{number}": each for number, each in enumerate(models, start=1)},
    )
    described = []
    for number, each in enumerate(task.classes, start=1):
        category, kind = terms_of(each.name)
        described.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=each.name[:64],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
        )
    return described


def _referable(path: Path) -> Any:
    """Return an image without its pixels, for a SEG to refer to; what DICOM wants to be there, if only empty, is added.

    Raises:
        IntakeError: it lacks the identifiers of its study or of itself.
    """
    dataset = pydicom.dcmread(path, stop_before_pixels=True, defer_size=_LARGE_ELEMENT)
    for keyword, instead in (
        ("SOPClassUID", "MediaStorageSOPClassUID"),
        ("SOPInstanceUID", "MediaStorageSOPInstanceUID"),
    ):
        if not dataset.get(keyword):
            setattr(dataset, keyword, dataset.file_meta.get(instead, ""))
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if not dataset.get(keyword):
            raise IntakeError(
                f"{path.name!a}: it has no {keyword}, which a DICOM SEG must refer to (an anonymiser may have emptied "
                "it). Choose --format nifti."
            )
    for keyword in _MAY_BE_EMPTY:
        if keyword not in dataset:
            setattr(dataset, keyword, None)
    return dataset


def _joint(models: Sequence[str]) -> str:
    return models[0] if len(models) == 1 else hashlib.sha256("|".join(models).encode()).hexdigest()


def _slices(segments: NDArray[np.uint8], stack: Stack) -> NDArray[np.uint8]:
    """Return segment numbers (slices, rows, columns) in the order of a stack's files, tilted back if it was."""
    matrix = np.linalg.inv(stack.straight.affine.numpy()) @ stack.affine
    if not np.allclose(matrix, np.eye(4), atol=1e-6):
        segments = ndimage.affine_transform(
            segments, matrix[:3, :3], matrix[:3, 3], stack.shape, order=0, mode="constant"
        )
    return np.ascontiguousarray(segments.transpose(2, 1, 0))


def _frames(segments: NDArray[np.uint8], grid: Geometry) -> hd.Volume:
    lps = (_LPS_TO_RAS @ grid.affine.numpy())[:, [2, 1, 0, 3]]
    return hd.Volume(np.ascontiguousarray(segments.transpose(2, 1, 0)), lps, coordinate_system="PATIENT")
