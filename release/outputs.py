"""Write segmentations where people can use them: NIfTI on the scan's own grid, or DICOM SEG for the PACS."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy import ndimage

from intake.dicom.series import DicomSeries, Stack
from intake.volume import IntakeError
from release.inputs import Input
from semisam_core.data.geometry import Geometry
from semisam_core.files import write_atomically
from semisam_core.plan_sections.task import TargetClass

SCHEME = "99FEDSEMISAM"
MAKER = "FedSemiSAM"
_SCANNER = 1
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
)


def write_nifti(path: Path, array: NDArray[Any], grid: Geometry, source: Path | None) -> None:
    """Write an array as NIfTI, atomically.

    Args:
        path: ends in .nii.gz.
        array: (X, Y, Z).
        grid: where its voxels lie.
        source: the scan's NIfTI file, whose geometry fields are taken over bit by bit; None for other formats.
    """
    if source is not None:
        header = nib.load(source).header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        for text in ("descrip", "aux_file", "intent_name"):
            header[text] = ""
        header["cal_min"] = header["cal_max"] = 0
        header.extensions.clear()
        kind = nib.Nifti2Image if header["sizeof_hdr"] == 540 else nib.Nifti1Image
        file = kind(array, None, header)
    else:
        file = nib.Nifti1Image(array, None)
        for setter in (file.set_qform, file.set_sform):
            setter(grid.affine.numpy(), _SCANNER)
        file.header.set_xyzt_units("mm")
    write_atomically(path, gzip.compress(file.to_bytes(), 5, mtime=0))


def write_dicom_seg(
    path: Path,
    labels: NDArray[np.uint16],
    grid: Geometry,
    series: DicomSeries,
    classes: Sequence[TargetClass],
    model: str,
    version: str,
) -> None:
    """Write a segmentation as DICOM SEG that refers to its series, one segment a class, atomically.

    It carries the patient's and study's attributes of the series, as a PACS needs. A class that was not found has a
    segment without frames.

    Args:
        path: ends in .dcm.
        labels: (columns, rows, slices), as the series was read.
        grid: the series' grid.
        series: what was segmented.
        classes: with their values.
        model: hash of the model's tensors.
        version: of this software.

    Raises:
        IntakeError: the series cannot be referred to, or nothing at all was found, which DICOM SEG cannot say.
    """
    if not labels.any():
        raise IntakeError("nothing was found, and a DICOM SEG without any frame is not allowed.")
    multi = series.slices[0].frames > 1
    files = [each.path for each in (series.slices if multi else series.stack.slices)]
    datasets = [_referable(file) for file in files]
    masks = np.stack([labels == each.label_values[0] for each in classes], -1).astype(np.uint8)
    algorithm = hd.AlgorithmIdentificationSequence(
        name=MAKER,
        family=codes.cid7162.ArtificialIntelligence,
        version=version,
        parameters={"model": model},
    )
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=each.name,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=_code(each.name),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, each in enumerate(classes, start=1)
    ]
    try:
        segmentation = hd.seg.Segmentation(
            source_images=datasets,
            pixel_array=_frames(masks, grid) if multi else _slices(masks, series.stack),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=described,
            series_instance_uid=generate_uid(entropy_srcs=[series.uid, series.part, model]),
            series_number=1000,
            sop_instance_uid=generate_uid(entropy_srcs=[series.uid, series.part, model, "1"]),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=version,
            device_serial_number=model[:16],
            series_description=f"{MAKER} segmentation",
        )
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise IntakeError(f"no DICOM SEG can refer to this series ({type(error).__name__}: {error}).") from None
    buffer = BytesIO()
    segmentation.save_as(buffer)
    write_atomically(path, buffer.getvalue())


def _referable(path: Path) -> Any:
    """Return an image that a SEG can refer to; what DICOM wants to be there, if only empty, is added.

    Raises:
        IntakeError: it lacks the identifiers of its study or of itself.
    """
    dataset = pydicom.dcmread(path)
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


def default_format(scan: Input) -> str:
    """Return `dicom-seg` for a DICOM series, otherwise `nifti`."""
    return "nifti" if scan.series is None else "dicom-seg"


def _code(name: str) -> Any:
    """Return the SNOMED code of a structure whose name is one of DICOM's own terms, else a private code."""
    term = "".join(part.capitalize() for part in name.split("-"))
    try:
        return getattr(codes.SCT, term)
    except AttributeError:
        return hd.sr.CodedConcept(value=name[:16], scheme_designator=SCHEME, meaning=name[:64])


def _slices(masks: NDArray[np.uint8], stack: Stack) -> NDArray[np.uint8]:
    """Return masks (slices, rows, columns, classes) in the order of a stack's files, tilted back if it was."""
    matrix = np.linalg.inv(stack.straight.affine.numpy()) @ stack.affine
    if not np.allclose(matrix, np.eye(4), atol=1e-6):
        own = (*stack.shape, masks.shape[-1])
        back = np.empty(own, dtype=np.uint8)
        for k in range(masks.shape[-1]):
            back[..., k] = ndimage.affine_transform(
                masks[..., k], matrix[:3, :3], matrix[:3, 3], stack.shape, order=0, mode="constant"
            )
        masks = back
    return np.ascontiguousarray(masks.transpose(2, 1, 0, 3))


def _frames(masks: NDArray[np.uint8], grid: Geometry) -> hd.Volume:
    lps = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine.numpy())[:, [2, 1, 0, 3]]
    channels = {hd.ChannelDescriptor("SegmentNumber"): list(range(1, masks.shape[-1] + 1))}
    array = np.ascontiguousarray(masks.transpose(2, 1, 0, 3))
    return hd.Volume(array, lps, coordinate_system="PATIENT", channels=channels)
