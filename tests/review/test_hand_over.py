"""A DICOM SEG goes to a viewer over the series that a scan was imported from, and comes back onto the scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intake.dicom.series import find_series, read_series
from intake.volume import IntakeError
from release.dicom_seg import write_dicom_seg
from release.outputs import nifti_bytes
from review.hand_over import hand_over_seg, series_of_scan, take_back_seg
from review.reviewing import Opened, ReviewError
from semisam_core.data.cases import Case, Role
from semisam_core.data.geometry import axis_change
from semisam_core.data.nifti import open_nifti
from tests.conftest import tiny_plan
from tests.intake.dicoms import write_series

PLAN = tiny_plan(
    "task={name: t, classes: [{name: one, value: 3}, {name: two, value: 5}], channels: [ct]}", "pseudo_labels=null"
)


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A scan that was imported from a series, along other axes than its own."""
    write_series(tmp_path / "dicom" / "a")
    (series,) = find_series(tmp_path / "dicom").series
    volume = read_series(series)
    image = tmp_path / "images" / "scan.nii.gz"
    image.parent.mkdir()
    image.write_bytes(nifti_bytes(volume.voxels.astype(np.float32), volume.geometry, None))
    grid = open_nifti(image, "scan", "image").geometry
    mask = np.zeros(grid.shape, np.uint8)
    mask[1:6, 2:4, 1] = 1
    mask[7, 1:6, 2:] = 2
    case = Case("scan", (image,), None, Role.UNLABELED)
    return Opened(case, grid, mask, "a" * 64, "b" * 64, "run", 1, {}, ("c" * 64,))


def test_a_seg_that_comes_back_unchanged_is_the_mask(opened: Opened, tmp_path: Path) -> None:
    series = series_of_scan(opened, tmp_path / "dicom", PLAN)
    hand_over_seg(opened, series, tmp_path / "mask.dcm", PLAN)
    assert np.array_equal(take_back_seg(opened, series, tmp_path / "mask.dcm", PLAN), opened.mask)


def test_a_scan_stored_along_other_axes_than_its_series_gets_its_mask_back(opened: Opened, tmp_path: Path) -> None:
    series = series_of_scan(opened, tmp_path / "dicom", PLAN)
    turned = opened.grid.affine[:, [2, 0, 1, 3]]
    other = replace(
        opened,
        grid=replace(opened.grid, affine=turned, shape=tuple(opened.grid.shape[k] for k in (2, 0, 1))),
        mask=opened.mask.transpose(2, 0, 1).copy(),
    )
    assert axis_change(other.grid, opened.grid).geometry(other.grid).shape == opened.grid.shape
    hand_over_seg(other, series, tmp_path / "mask.dcm", PLAN)
    assert np.array_equal(take_back_seg(opened, series, tmp_path / "mask.dcm", PLAN), opened.mask)
    assert np.array_equal(take_back_seg(other, series, tmp_path / "mask.dcm", PLAN), other.mask)


def test_a_seg_of_other_segments_is_refused(opened: Opened, tmp_path: Path) -> None:
    series = series_of_scan(opened, tmp_path / "dicom", PLAN)
    other = tiny_plan("task={name: t, classes: [{name: liver, value: 1}], channels: [ct]}", "pseudo_labels=null")
    grid = read_series(series).geometry
    write_dicom_seg(tmp_path / "mask.dcm", np.ones(grid.shape, np.uint8), grid, series, other.task, ["d" * 64])
    with pytest.raises(IntakeError, match="it has the segments liver; none is wanted"):
        take_back_seg(opened, series, tmp_path / "mask.dcm", PLAN)


def test_only_the_series_with_the_scans_grid_is_taken(opened: Opened, tmp_path: Path) -> None:
    write_series(tmp_path / "dicom" / "b", series="9.9.9", positions=[[50.0, 0.0, 4.0 * k] for k in range(6)])
    series = series_of_scan(opened, tmp_path / "dicom", PLAN)
    assert series.uid == "1.2.3.4"
    with pytest.raises(ReviewError, match="0 of 1 series in the folder have the grid of this scan"):
        series_of_scan(opened, tmp_path / "dicom" / "b", PLAN)
    write_series(tmp_path / "dicom" / "c", series="8.8.8")
    with pytest.raises(ReviewError, match="2 of 3 series"):
        series_of_scan(opened, tmp_path / "dicom", PLAN)
