"""Labels and channels on their image's grid, however they are stored, and those off it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from semisam_core.data.scans import Scan, load_original_label
from semisam_core.errors import CaseError
from tests.conftest import blob, tiny_plan
from tests.semisam_core.data.files import AFFINE, load, stored_along, the_case, write_pair, write_volume

ALL_AXES = [
    axes for order in itertools.permutations(["RL", "AP", "SI"]) for axes in itertools.product(*order)
]  # 48 orientations


def _oblique(degrees: float, spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)) -> NDArray[Any]:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (degrees, -degrees, degrees / 2), degrees=True).as_matrix() @ np.diag(
        spacing
    )
    affine[:3, 3] = (-30.0, 12.5, 7.0)
    return affine


def test_there_are_48_orientations() -> None:
    assert len(set(ALL_AXES)) == 48


@settings(deadline=None, max_examples=100)
@given(
    image_axes=st.sampled_from(ALL_AXES), label_axes=st.sampled_from(ALL_AXES), degrees=st.sampled_from([0.0, 10, 40])
)
def test_a_label_along_any_axes_is_brought_onto_its_images_grid(
    tmp_path_factory: pytest.TempPathFactory, image_axes: tuple[str, ...], label_axes: tuple[str, ...], degrees: float
) -> None:
    folder = tmp_path_factory.mktemp("site")
    on_image, affine = _write_along(folder, image_axes, label_axes, degrees)
    label, geometry = load_original_label(the_case(folder), tiny_plan())
    assert np.array_equal(label.numpy(), on_image)
    assert geometry.shape == on_image.shape
    assert np.allclose(geometry.affine.numpy(), affine, atol=1e-5)


@pytest.mark.parametrize("label_axes", ALL_AXES, ids="".join)
def test_a_label_along_any_axes_is_trained_on_where_it_lies(tmp_path: Path, label_axes: tuple[str, ...]) -> None:
    _write_along(tmp_path, ("R", "A", "S"), label_axes, 0.0)
    assert np.array_equal(_label_of(load(tmp_path, "data.spacing_mm=[2.0, 2.5, 3.0]")), _marked())


def _write_along(
    folder: Path, image_axes: tuple[str, ...], label_axes: tuple[str, ...], degrees: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Write an image and its label along axes of their own; return the label on the image's grid, and its affine."""
    affine = _oblique(degrees, (2.0, 2.5, 3.0))
    write_volume(folder / "images" / "a.nii.gz", *stored_along(blob((12, 10, 8))[0], affine, image_axes))
    write_volume(folder / "labels" / "a.nii.gz", *stored_along(_marked(), affine, label_axes))
    return stored_along(_marked(), affine, image_axes)


def _marked() -> NDArray[Any]:
    """Return a label (12, 10, 8) without any symmetry."""
    marked = blob((12, 10, 8))[1]
    marked[1, 2, 3] = 1
    return marked


def _label_of(scan: Scan) -> NDArray[Any]:
    assert scan.label is not None
    return scan.label.numpy()


@pytest.mark.parametrize("axes", ["LPS", "LAS", "SLP", "PIR"])
def test_labels_as_itk_and_slicer_store_them_are_used(tmp_path: Path, axes: str) -> None:
    write_pair(tmp_path)
    label, affine = stored_along(blob()[1], AFFINE, tuple(axes))
    write_volume(tmp_path / "labels" / "a.nii.gz", label, affine)
    assert np.array_equal(_label_of(load(tmp_path)), blob()[1])


def test_channels_along_other_axes_are_brought_onto_the_first(tmp_path: Path) -> None:
    image, label = blob()
    for k in range(2):
        turned, affine = stored_along(image + 50 * k, AFFINE, ("RAS", "PIR")[k])  # type: ignore[arg-type]
        write_volume(tmp_path / "images" / f"a_000{k}.nii.gz", turned, affine)
    write_volume(tmp_path / "labels" / "a.nii.gz", label)
    scan = load(tmp_path, "task.channels=[t1, t2]")
    assert scan.image.shape == (2, 24, 24, 16)
    assert np.allclose(scan.image[0], scan.image[1], atol=1e-4)  # normalised, they differ in nothing


def test_axes_are_judged_by_the_affine_not_by_the_voxels(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_volume(tmp_path / "labels" / "a.nii.gz", blob()[1][::-1])
    assert np.array_equal(_label_of(load(tmp_path)), blob()[1][::-1])


def test_a_label_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    write_pair(tmp_path, label=blob()[1][1:])
    with pytest.raises(CaseError, match=r"label has shape \(23, 24, 16\), the image has \(24, 24, 16\)"):
        load(tmp_path)


def test_a_label_elsewhere_is_refused_with_the_distance_of_corners(tmp_path: Path) -> None:
    write_pair(tmp_path)
    shifted = AFFINE.copy()
    shifted[0, 3] = 4.0
    write_volume(tmp_path / "labels" / "a.nii.gz", blob()[1], shifted)
    with pytest.raises(CaseError, match=r"corners are up to 2 voxels \(4 mm\) apart; accepted are 0.25 voxels"):
        load(tmp_path)


def _on_256(folder: Path, label_affine: NDArray[Any]) -> Path:
    """Write a scan of 256 x 256 x 8 voxels of 0.703 x 0.703 x 3 mm with a label on another grid."""
    volume = np.zeros((256, 256, 8), np.uint8)
    volume[100:150, 100:150, 2:6] = 1
    write_volume(folder / "images" / "a.nii.gz", volume, np.diag([0.703, 0.703, 3.0, 1.0]))
    write_volume(folder / "labels" / "a.nii.gz", volume, label_affine)
    return folder


def test_a_shift_of_a_hundredth_of_a_millimetre_is_accepted(tmp_path: Path) -> None:
    affine = np.diag([0.703, 0.703, 3.0, 1.0])
    affine[:3, 3] = 0.011
    label, geometry = load_original_label(the_case(_on_256(tmp_path, affine)), tiny_plan())
    assert int(label.sum()) == 50 * 50 * 4
    assert float(geometry.affine[0, 3]) == 0.0  # the image's grid, not the label's


def test_a_voxel_size_that_is_slightly_off_is_refused_where_it_adds_up(tmp_path: Path) -> None:
    folder = _on_256(tmp_path, np.diag([0.71, 0.71, 3.0, 1.0]))
    with pytest.raises(CaseError, match=r"up to 3\.\d+ voxels \(2\.\d+ mm\) apart"):
        load(folder)


def test_half_a_degree_of_rotation_is_refused(tmp_path: Path) -> None:
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("z", 0.5, degrees=True).as_matrix()
    folder = _on_256(tmp_path, turned @ np.diag([0.703, 0.703, 3.0, 1.0]))
    with pytest.raises(CaseError, match=r"voxels \(2\.\d+ mm\) apart"):
        load(folder)


@pytest.mark.parametrize(("voxels", "accepted"), [(0.2, True), (0.3, False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shifts_are_measured_in_voxels_along_each_axis(
    tmp_path: Path, axis: int, voxels: float, accepted: bool
) -> None:
    spacing = (1.0, 2.0, 5.0)
    affine = np.diag([*spacing, 1.0])
    write_pair(tmp_path, affine=affine)
    affine[axis, 3] = voxels * spacing[axis]
    write_volume(tmp_path / "labels" / "a.nii.gz", blob()[1], affine)
    if accepted:
        load(tmp_path)
        return
    with pytest.raises(CaseError, match=r"up to 0\.3 voxels"):
        load(tmp_path)


def test_a_rotation_kept_as_a_float32_quaternion_is_accepted(tmp_path: Path) -> None:
    """Some programs write the qform only, whose rotation is three float32 numbers."""
    write_pair(tmp_path, affine=_oblique(40.0))
    image = nib.Nifti1Image(blob()[1], None)
    image.set_qform(_oblique(40.0), code=1)
    nib.save(image, tmp_path / "labels" / "a.nii.gz")
    written = nib.load(tmp_path / "labels" / "a.nii.gz")
    assert not np.array_equal(written.affine, nib.load(tmp_path / "images" / "a.nii.gz").affine)
    load(tmp_path)
