"""Small DICOM files, as scanners and planning systems write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    generate_uid,
)

SPACING, STEP = (2.0, 1.5), 3.0  # rows, columns; slices; mm
ORIGIN = np.array([10.0, -20.0, 5.0])


def at(x: float, y: float, z: float) -> NDArray[np.float64]:
    """Return a place so many mm from the first voxel (LPS)."""
    return ORIGIN + np.array([x, y, z])


def ramp(slices: int = 6, rows: int = 8, columns: int = 10) -> NDArray[np.int16]:
    """Return (slices, rows, columns), every voxel different."""
    return np.arange(slices * rows * columns, dtype=np.int16).reshape(slices, rows, columns)


def write_series(
    folder: Path,
    voxels: NDArray[Any] | None = None,
    series: str = "1.2.3.4",
    positions: Sequence[Sequence[float]] | None = None,
    change: Callable[[FileDataset, int], None] | None = None,
    syntax: str = ExplicitVRLittleEndian,
) -> list[Path]:
    """Write one file a slice, in an order that is not that of the slices.

    Args:
        folder: created if missing.
        voxels: (slices, rows, columns) int16 of stored values.
        series: series instance UID.
        positions: of the first voxel of each slice; by default even steps along the patient's axis.
        change: called with each dataset and its number before it is written.
        syntax: transfer syntax.
    """
    folder.mkdir(parents=True, exist_ok=True)
    voxels = ramp() if voxels is None else voxels
    paths = []
    for k, pixels in enumerate(voxels):
        dataset = _image(pixels, series, f"{series}.{k + 1}")
        dataset.InstanceNumber = len(voxels) - k
        place = at(0, 0, STEP * k) if positions is None else positions[k]
        dataset.ImagePositionPatient = [float(x) for x in place]
        if change:
            change(dataset, k)
        if syntax == DeflatedExplicitVRLittleEndian:
            dataset.file_meta.TransferSyntaxUID = syntax
        elif syntax != ExplicitVRLittleEndian:
            dataset.compress(syntax)
        path = folder / f"IM{(k * 7) % 97:03d}"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def write_multi_frame(path: Path, files: Sequence[Path]) -> Path:
    """Write an enhanced CT that highdicom makes of single frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sources = [pydicom.dcmread(file) for file in files]
    hd.legacy.LegacyConvertedEnhancedCTImage(sources, "1.2.8", 1, "1.2.8.1", 1).save_as(path)
    return path


def _image(pixels: NDArray[Any], series: str, uid: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, uid
    dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = "MRN-4711", "Muster^Erika", "19420101"
    dataset.PatientSex, dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "F", "20240101", "101010", "A1"
    dataset.StudyID, dataset.ReferringPhysicianName, dataset.SeriesNumber = "1", "", 1
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", series, "1.2.9"
    dataset.Modality, dataset.SeriesDescription, dataset.ImageType = (
        "CT",
        "Thorax 3.0",
        ["ORIGINAL", "PRIMARY", "AXIAL"],
    )
    dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], list(SPACING)
    dataset.PositionReferenceIndicator, dataset.SliceThickness = "", STEP
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
    dataset.PixelData = np.ascontiguousarray(pixels, dtype=np.int16).tobytes()
    return dataset


def write_seg(path: Path, files: Sequence[Path], mask: NDArray[np.uint8], names: Sequence[str]) -> None:
    """Write a SEG of a series; `mask` is (slices, rows, columns, segments), in the order of `files`."""
    sources = [pydicom.dcmread(file) for file in files]
    segments = [
        hd.seg.SegmentDescription(
            k, name, codes.SCT.AnatomicalStructure, codes.SCT.Liver, hd.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for k, name in enumerate(names, start=1)
    ]
    hd.seg.Segmentation(
        sources,
        mask,
        hd.seg.SegmentationTypeValues.BINARY,
        segments,
        generate_uid(),
        2,
        generate_uid(),
        1,
        "m",
        "n",
        "1",
        "x",
    ).save_as(path)


def write_rtstruct(path: Path, contours: dict[str, Sequence[NDArray[Any]]], series: str = "1.2.3.4") -> None:
    """Write an RTSTRUCT; contours are (points, 3) in mm, LPS."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientID = "RTSTRUCT", "MRN-4711"
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), "1.2.3"
    dataset.StructureSetROISequence = [_with(ROINumber=k, ROIName=name) for k, name in enumerate(contours, start=1)]
    dataset.ROIContourSequence = [
        _with(
            ReferencedROINumber=k,
            ContourSequence=[
                _with(
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(each),
                    ContourData=[round(float(x), 4) for x in each.ravel()],
                )
                for each in several
            ],
        )
        for k, several in enumerate(contours.values(), start=1)
    ]
    named = _with(SeriesInstanceUID=series)
    study = _with(RTReferencedSeriesSequence=[named])
    dataset.ReferencedFrameOfReferenceSequence = [_with(FrameOfReferenceUID="1.2.9", RTReferencedStudySequence=[study])]
    dataset.save_as(path, enforce_file_format=True)


def _with(**tags: Any) -> Dataset:
    dataset = Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset
