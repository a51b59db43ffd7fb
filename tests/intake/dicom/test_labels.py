"""Labels from SEG and RTSTRUCT lie on the voxels of the series that they were drawn on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from intake.dicom.labels import read_label, segment_names
from intake.dicom.series import find_series
from intake.volume import IntakeError
from tests.intake.dicoms import ORIGIN, SPACING, STEP, at, ramp, write_rtstruct, write_seg, write_series


def _masks() -> np.ndarray:
    masks = np.zeros((*ramp().shape, 2), dtype=np.uint8)
    masks[1:3, 2:5, 3:6, 0] = 1
    masks[4, 6:8, 7:9, 1] = 1
    return masks


def _circle(centre: np.ndarray, radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return centre + radius * np.c_[np.cos(angles), np.sin(angles), np.zeros(72)]


def test_a_seg_marks_the_voxels_that_it_was_drawn_on(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct")
    write_seg(tmp_path / "label.dcm", files, _masks(), ["Liver", "Spleen"])
    found = find_series(tmp_path)
    assert [label.refers_to for label in found.labels] == [frozenset({"1.2.3.4"})]
    label = read_label(found.labels[0].path, "SEG", found.series[0])
    expected = (_masks() * [1, 2]).sum(-1).transpose(2, 1, 0)
    np.testing.assert_array_equal(label.volume.voxels, expected)
    assert label.names == {1: "Liver", 2: "Spleen"}


def test_wanted_segments_are_chosen_by_name_in_any_case(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct")
    write_seg(tmp_path / "label.dcm", files, _masks(), ["Liver", "Spleen"])
    series = find_series(tmp_path).series[0]
    assert set(np.unique(read_label(tmp_path / "label.dcm", "SEG", series, ["spleen"]).volume.voxels)) == {0, 2}
    with pytest.raises(IntakeError, match="Liver, Spleen; none is wanted"):
        read_label(tmp_path / "label.dcm", "SEG", series, ["kidney"])


def test_a_seg_of_another_series_is_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct")
    write_seg(tmp_path / "label.dcm", files, _masks(), ["Liver", "Spleen"])
    write_series(tmp_path / "other", positions=[at(0.7, 0, STEP * k) for k in range(6)])
    other = find_series(tmp_path / "other").series[0]
    with pytest.raises(IntakeError, match="does not lie on the voxels"):
        read_label(tmp_path / "label.dcm", "SEG", other)


def test_contours_become_a_ball_with_a_hole(tmp_path: Path) -> None:
    shape = (16, 40, 40)
    write_series(tmp_path / "ct", np.zeros(shape, dtype=np.int16))
    centre = at(29.0, 39.0, 22.5)
    ball, hole = [], []
    for k in range(shape[0]):
        height = STEP * k + ORIGIN[2] - centre[2]
        for rings, radius in ((ball, 18.0), (hole, 9.0)):
            if abs(height) < radius:
                ring = _circle(centre + np.array([0, 0, height]), float(np.sqrt(radius**2 - height**2)))
                rings.append(ring)
    write_rtstruct(tmp_path / "rt.dcm", {"Tumour": [*ball, *hole]})
    found = find_series(tmp_path)
    label = read_label(found.labels[0].path, "RTSTRUCT", found.series[0])
    volume = (label.volume.voxels > 0).sum() * SPACING[0] * SPACING[1] * STEP
    assert volume == pytest.approx(4 / 3 * np.pi * (18**3 - 9**3), rel=0.03)
    assert segment_names(found.labels[0].path) == {1: "Tumour"}


def test_wanted_regions_that_overlap_are_refused_but_others_may(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros((6, 30, 30), dtype=np.int16))
    centre = at(20.0, 25.0, STEP * 2)
    write_rtstruct(tmp_path / "rt.dcm", {"BODY": [_circle(centre, 18)], "GTV": [_circle(centre, 8)]})
    series = find_series(tmp_path).series[0]
    with pytest.raises(IntakeError, match="GTV and BODY overlap"):
        read_label(tmp_path / "rt.dcm", "RTSTRUCT", series)
    assert read_label(tmp_path / "rt.dcm", "RTSTRUCT", series, ["GTV"]).volume.voxels.any()


def test_contours_between_slices_are_left_out_with_a_note(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", np.zeros((6, 30, 30), dtype=np.int16))
    centre = at(20.0, 25.0, STEP * 2)
    far = _circle(centre + np.array([0, 0, 100]), 8)
    write_rtstruct(tmp_path / "rt.dcm", {"GTV": [_circle(centre, 8), far]})
    series = find_series(tmp_path).series[0]
    assert "1 contours lie on no slice" in read_label(tmp_path / "rt.dcm", "RTSTRUCT", series).volume.notes[0]
