"""Series as a PACS exports them: what becomes a volume, and what is refused with which reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import RLELossless

from intake.candidates import Listing, Wishes
from intake.dicom.series import DicomSeries, find_series, read_series
from intake.layouts import layout_of
from intake.volume import IntakeError, Volume
from tests.intake.dicoms import ORIGIN, SPACING, STEP, at, ramp, write_multi_frame, write_seg, write_series

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def _only(folder: Path) -> DicomSeries:
    found = find_series(folder)
    assert len(found.series) == 1, found
    return found.series[0]


def _expected() -> np.ndarray:
    return (2.0 * ramp() - 1000).transpose(2, 1, 0)  # (columns, rows, slices)


def _refusal(folder: Path) -> str:
    with pytest.raises(IntakeError) as error:
        read_series(_only(folder))
    return str(error.value)


def test_slices_are_sorted_by_position_and_rescaled(tmp_path: Path) -> None:
    write_series(tmp_path)
    volume = read_series(_only(tmp_path))
    np.testing.assert_array_equal(volume.voxels, _expected())
    affine = np.diag([-SPACING[1], -SPACING[0], STEP, 1.0])
    affine[:3, 3] = -ORIGIN[0], -ORIGIN[1], ORIGIN[2]
    np.testing.assert_allclose(volume.geometry.affine.numpy(), affine)


@pytest.mark.parametrize("folder", ["mr-dicom/13_HCropVolume", "mr-dicom/36459-FLAIRreg-76244", "ct/dicom"])
def test_real_series_are_read_as_simpleitk_reads_them(folder: str) -> None:
    if not (REAL / folder).is_dir():
        pytest.skip(f"the scans in {folder} are not on this machine")
    series = _only(REAL / folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(REAL / folder)))
    image = reader.Execute()
    volume = read_series(series)
    np.testing.assert_array_equal(volume.voxels, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.geometry.affine.numpy(), np.diag([-1, -1, 1, 1]) @ lps, atol=1e-4)


def test_mixed_series_and_other_files_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path / "a", series="1.2.3.1")
    write_series(tmp_path / "b", series="1.2.3.2")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / f"x{path.name}")

    def screenshot(dataset: Any, _: int) -> None:
        del dataset.ImagePositionPatient

    def localizer(dataset: Any, _: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_series(tmp_path / "c", ramp(1), series="1.2.3.3", change=screenshot)
    write_series(tmp_path / "d", ramp(1), series="1.2.3.4", change=localizer)
    (tmp_path / "notes.txt").write_text("not DICOM")
    found = find_series(tmp_path)
    assert [each.uid for each in found.series] == ["1.2.3.1", "1.2.3.2"]
    reasons = " ".join(reason for _, reason in found.skipped)
    assert len(found.skipped) == 3
    for word in ("no DICOM file", "localizer", "position"):
        assert word in reasons


def test_a_missing_slice_is_reported_with_its_place(tmp_path: Path) -> None:
    write_series(tmp_path)[3].unlink()
    assert "1 slices are missing, the first 3 mm after slice 3 of 5" in _refusal(tmp_path)


def test_unevenly_spaced_slices_are_refused(tmp_path: Path) -> None:
    heights = [0, 3, 6, 10, 14, 18]
    write_series(tmp_path, positions=[at(0, 0, z) for z in heights])
    assert "3 to 4 mm apart" in _refusal(tmp_path)


def test_rounded_positions_are_read_with_a_note(tmp_path: Path) -> None:
    heights = [0, 3.1, 6, 9, 12.1, 15]
    write_series(tmp_path, positions=[at(0, 0, z) for z in heights])
    assert "2.9 to 3.1 mm apart; 3 mm is used" in read_series(_only(tmp_path)).notes[0]


def test_a_slice_that_is_there_twice_is_used_once(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    (tmp_path / "copy").write_bytes(paths[2].read_bytes())
    volume = read_series(_only(tmp_path))
    np.testing.assert_array_equal(volume.voxels, _expected())
    assert "there twice" in volume.notes[0]


def test_two_images_that_claim_one_place_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    write_series(tmp_path / "b", ramp()[::-1].copy())
    assert "claim the same place and differ" in _refusal(tmp_path)


def test_phases_of_one_series_become_volumes_of_their_own(tmp_path: Path) -> None:
    for phase in (1, 2):

        def tell(dataset: Any, k: int, phase: int = phase) -> None:
            dataset.TemporalPositionIdentifier = phase
            dataset.SOPInstanceUID = f"1.2.3.4.{phase}.{k + 1}"

        write_series(tmp_path / str(phase), ramp() * phase, change=tell)
    found = find_series(tmp_path)
    assert [each.part for each in found.series] == ["TemporalPositionIdentifier 1", "TemporalPositionIdentifier 2"]
    np.testing.assert_array_equal(read_series(found.series[1]).voxels, (4.0 * ramp() - 1000).transpose(2, 1, 0))


def test_a_tilted_gantry_is_straightened(tmp_path: Path) -> None:
    """A ball that was scanned with a tilted gantry is a ball at its place again."""
    tilt, shape = 0.5, (16, 40, 40)  # mm of drift for each mm of table movement
    positions = [np.array([0.0, tilt * STEP * k, STEP * k]) for k in range(shape[0])]
    rows, columns = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    centre = np.array([30.0, 50.0, 22.5])
    voxels = np.zeros(shape, dtype=np.int16)
    for k, place in enumerate(positions):
        x, y, z = place[0] + SPACING[1] * columns, place[1] + SPACING[0] * rows, place[2]
        voxels[k] = 1000 * (np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) < 15)
    write_series(tmp_path, voxels, positions=positions)
    volume = read_series(_only(tmp_path))
    assert "tilted by 26.6 degrees" in volume.notes[0]
    affine = volume.geometry.affine.numpy()
    assert abs(affine[:3, 1] @ affine[:3, 2]) < 1e-9
    inside = np.argwhere(volume.voxels > 0)
    places = inside @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(places.mean(0), centre * [-1, -1, 1], atol=1.0)
    radius = (len(inside) * abs(np.linalg.det(affine[:3, :3])) * 3 / (4 * np.pi)) ** (1 / 3)
    assert radius == pytest.approx(15, abs=0.5)


def test_dark_is_bright_in_monochrome1(tmp_path: Path) -> None:
    def invert(dataset: Any, _: int) -> None:
        dataset.PhotometricInterpretation = "MONOCHROME1"

    write_series(tmp_path, (-1 - ramp()).astype(np.int16), change=invert)
    np.testing.assert_array_equal(read_series(_only(tmp_path)).voxels, _expected())


def test_compressed_pixels_are_decoded(tmp_path: Path) -> None:
    write_series(tmp_path, syntax=RLELossless)
    np.testing.assert_array_equal(read_series(_only(tmp_path)).voxels, _expected())


def test_pixels_that_cannot_be_decoded_name_the_file(tmp_path: Path) -> None:
    path = write_series(tmp_path)[2]
    dataset = pydicom.dcmread(path)
    dataset.PixelData = dataset.PixelData[:10]
    dataset.save_as(path)
    assert path.name in _refusal(tmp_path)


def test_a_multi_frame_image_is_one_volume(tmp_path: Path) -> None:
    """An enhanced CT, which highdicom makes from single frames."""
    files = write_series(tmp_path / "single")
    volume = read_series(_only(tmp_path / "single"))
    write_multi_frame(tmp_path / "multi" / "frames.dcm", files)
    found: Volume = read_series(_only(tmp_path / "multi"))
    np.testing.assert_array_equal(found.voxels, volume.voxels)
    np.testing.assert_allclose(found.geometry.affine.numpy(), volume.geometry.affine.numpy(), atol=1e-5)


def _alone(path: Path) -> Listing:
    return layout_of(path, "auto").find(path, Wishes())


def test_one_multi_frame_file_can_be_named_alone(tmp_path: Path) -> None:
    path = write_multi_frame(tmp_path / "multi" / "frames", write_series(tmp_path / "single"))
    write_series(tmp_path / "multi")  # what lies beside it is not looked at
    (candidate,) = _alone(path).candidates
    assert candidate.channels[0].paths == (str(path),)


def test_a_file_alone_that_is_no_volume_is_refused_in_a_sentence(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct")
    write_seg(tmp_path / "seg.dcm", files, np.ones((6, 8, 10), np.uint8), ["liver"])
    (tmp_path / "letter.pdf").write_bytes(b"%PDF")
    for path, said in (
        (files[2], "it is one slice of series Thorax 3.0; name the folder that holds all its slices"),
        (tmp_path / "seg.dcm", r"it is a label \(SEG\), no image"),
        (tmp_path / "letter.pdf", "it is no DICOM file; accepted are one multi-frame DICOM image, .nii"),
    ):
        with pytest.raises(IntakeError, match=said):
            _alone(path)
