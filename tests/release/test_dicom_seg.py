"""A DICOM SEG reads back as what was written, on the grid of the series that it refers to."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from intake.dicom.labels import read_label
from intake.dicom.series import DicomSeries, find_series, grid_of, read_series
from intake.volume import IntakeError
from release import dicom_seg
from release.dicom_seg import write_dicom_seg
from release.dicom_terms import SCHEME, terms_of
from semisam_core.plan_sections.task import Task
from tests.conftest import tiny_plan
from tests.intake.dicoms import STEP, at, ramp, write_series
from tests.release.runs import TWO_CLASSES

MODELS = ["ab" * 32]


def _task() -> Task:
    return tiny_plan(TWO_CLASSES).task


def _only(folder: Path) -> DicomSeries:
    (series,) = find_series(folder).series
    return series


def _labels(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return labels that no axis can be swapped or flipped in unnoticed: (columns, rows, slices)."""
    labels = np.zeros(shape, np.uint8)
    labels[1:6, 2:4, 1] = 3
    labels[7, 1:6, 2:] = 5
    labels[2, 5, 3] = 3
    return labels


def _write(path: Path, series: DicomSeries, labels: NDArray[np.uint8], task: Task | None = None) -> pydicom.Dataset:
    write_dicom_seg(path, labels, grid_of(series), series, task or _task(), MODELS)
    return pydicom.dcmread(path)


def _read(path: Path) -> hd.Volume:
    return hd.seg.segread(path).get_volume(combine_segments=True)


def test_it_reads_back_on_the_voxels_of_its_series(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    series, labels = _only(tmp_path / "ct"), _labels((10, 8, 6))
    _write(tmp_path / "seg.dcm", series, labels)
    back = _read(tmp_path / "seg.dcm")
    scan = hd.get_volume_from_series([pydicom.dcmread(path) for path in series.files])
    assert back.spatial_shape == scan.spatial_shape
    assert np.allclose(back.affine, scan.affine)
    numbers = np.array([0, 0, 0, 1, 0, 2], np.uint8)[labels]
    assert np.array_equal(back.array[::-1], numbers.transpose(2, 1, 0))  # highdicom counts slices from the other end
    again = read_label(tmp_path / "seg.dcm", "SEG", series)
    assert np.array_equal(again.volume.voxels, numbers)
    assert again.names == {1: "left-atrium", 2: "outer-shell"}


def test_a_tilted_series_is_met_slice_by_slice(tmp_path: Path) -> None:
    positions = [at(0, 2.0 * k, STEP * k).tolist() for k in range(6)]  # one row a slice
    write_series(tmp_path / "ct", positions=positions)
    series = _only(tmp_path / "ct")
    upright = read_series(series)
    on_slices = np.zeros((10, 8, 6), np.uint8)  # as the slices are, not as the upright volume is
    on_slices[3:7, 2:5, 1:5] = 3
    labels = np.zeros(upright.geometry.shape, np.uint8)
    to_upright = np.linalg.inv(upright.geometry.affine.numpy()) @ series.stack.affine
    for index in np.argwhere(on_slices):
        place = np.rint((to_upright @ [*index, 1])[:3]).astype(int)
        labels[tuple(place)] = 3
    dataset = _write(tmp_path / "seg.dcm", series, labels)
    found = np.zeros((10, 8, 6), bool)
    frames = dataset.pixel_array
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 1:
            position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
            k = int(np.argmin([np.linalg.norm(position - each) for each in positions]))
            assert np.allclose(position, positions[k])
            found[:, :, k] = frame.T > 0
    assert np.array_equal(found, on_slices > 0)


def test_a_multi_frame_series_is_met_frame_by_frame(tmp_path: Path) -> None:
    files = write_series(tmp_path / "single", ramp())
    sources = [pydicom.dcmread(path) for path in files]
    enhanced = hd.legacy.LegacyConvertedEnhancedCTImage(
        sources, series_instance_uid="1.2.3.5", series_number=2, sop_instance_uid="1.2.3.5.1", instance_number=1
    )
    (tmp_path / "multi").mkdir()
    enhanced.save_as(tmp_path / "multi" / "one.dcm")
    series, single = _only(tmp_path / "multi"), read_series(_only(tmp_path / "single"))
    volume = read_series(series)
    labels = (volume.voxels > np.median(single.voxels)).astype(np.uint8) * 5
    _write(tmp_path / "seg.dcm", series, labels)
    again = read_label(tmp_path / "seg.dcm", "SEG", series)
    assert np.array_equal(again.volume.voxels > 0, labels > 0)
    assert again.names[2] == "outer-shell"


def test_a_scan_in_which_nothing_is_found_has_a_seg_too(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    series = _only(tmp_path / "ct")
    dataset = _write(tmp_path / "seg.dcm", series, np.zeros((10, 8, 6), np.uint8))
    assert [each.SegmentLabel for each in dataset.SegmentSequence] == ["left-atrium", "outer-shell"]
    assert not _read(tmp_path / "seg.dcm").array.any()


def test_it_carries_patient_study_and_algorithm(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct")
    series = _only(tmp_path / "ct")
    dataset = _write(tmp_path / "seg.dcm", series, _labels((10, 8, 6)))
    source = pydicom.dcmread(files[0])
    same = (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "StudyInstanceUID",
        "AccessionNumber",
        "FrameOfReferenceUID",
    )
    assert all(dataset[keyword] == source[keyword] for keyword in same)
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    assert dataset.SegmentationType == "BINARY"
    (referenced,) = dataset.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == series.uid
    named = {each.ReferencedSOPInstanceUID for each in referenced.ReferencedInstanceSequence}
    assert named == {pydicom.dcmread(path).SOPInstanceUID for path in files}
    first, second = dataset.SegmentSequence
    algorithm = first.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "FedSemiSAM tiny"
    assert MODELS[0] in algorithm.AlgorithmParameters
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeValue == "82471001"
    assert second.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == SCHEME


def test_another_result_is_another_instance_and_the_same_result_the_same(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    series, labels = _only(tmp_path / "ct"), _labels((10, 8, 6))
    first = _write(tmp_path / "a.dcm", series, labels).SOPInstanceUID
    assert _write(tmp_path / "b.dcm", series, labels).SOPInstanceUID == first
    labels[0, 0, 0] = 3
    assert _write(tmp_path / "c.dcm", series, labels).SOPInstanceUID != first


def test_many_frames_are_written_without_the_empty_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_seg, "MOST_FRAMES", 11)
    write_series(tmp_path / "ct")
    series, labels = _only(tmp_path / "ct"), _labels((10, 8, 6))
    dataset = _write(tmp_path / "seg.dcm", series, labels)
    assert dataset.NumberOfFrames == len(np.unique(np.argwhere(labels == 3)[:, 2])) + 4
    again = read_label(tmp_path / "seg.dcm", "SEG", series)
    assert np.array_equal(again.volume.voxels, np.array([0, 0, 0, 1, 0, 2])[labels])


def test_a_series_without_the_identifiers_that_a_seg_refers_to_is_refused(tmp_path: Path) -> None:
    def without_study(dataset: pydicom.FileDataset, number: int) -> None:
        dataset.StudyInstanceUID = ""

    write_series(tmp_path / "ct", change=without_study)
    with pytest.raises(IntakeError, match=r"no StudyInstanceUID, .* Choose --format nifti"):
        _write(tmp_path / "seg.dcm", _only(tmp_path / "ct"), _labels((10, 8, 6)))


def test_only_names_that_are_dicoms_own_terms_get_its_codes() -> None:
    assert terms_of("left-atrium")[1].value == "82471001"
    assert terms_of("hippocampus")[1].value == "5366008"
    category, kind = terms_of("neoplasm")
    assert (category.meaning, kind.value) == ("Morphologically Abnormal Structure", "108369006")
    assert terms_of("anterior")[1].scheme_designator == SCHEME  # a direction in SNOMED, here a part of something
    long = [terms_of(f"posterior-part-of-the-{side}-lobe")[1] for side in ("left", "right")]
    assert long[0].value != long[1].value
    assert all(len(each.value) <= 16 for each in long)
