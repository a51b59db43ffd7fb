"""NIfTI headers in practice: extra axes, units, sizes, colours, and files that are not scans."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.data.nifti import open_nifti
from semisam_core.data.scans import load_original_label
from semisam_core.errors import CaseError
from tests.conftest import blob, tiny_plan
from tests.semisam_core.data.files import AFFINE, load, the_case, write_pair, write_volume

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@settings(deadline=None, max_examples=9)
@given(image=st.integers(0, 4), label=st.integers(0, 4))
def test_trailing_axes_of_length_one_are_dropped(
    tmp_path_factory: pytest.TempPathFactory, image: int, label: int
) -> None:
    folder = tmp_path_factory.mktemp("site")
    expected = load(write_pair(folder))
    voxels, marked = blob()
    write_pair(folder, voxels.reshape(24, 24, 16, *[1] * image), marked.reshape(24, 24, 16, *[1] * label))
    found = load(folder)
    assert torch.equal(found.image, expected.image)
    assert found.label is not None
    assert np.array_equal(found.label.numpy(), marked)
    assert tuple(load_original_label(the_case(folder), tiny_plan())[0].shape) == (24, 24, 16)


def test_channels_with_a_trailing_axis_are_stacked(tmp_path: Path) -> None:
    for k in range(2):
        write_volume(tmp_path / "images" / f"a_000{k}.nii.gz", blob(seed=k)[0][..., None])
    write_volume(tmp_path / "labels" / "a.nii.gz", blob()[1])
    assert load(tmp_path, "task.channels=[t1, t2]").image.shape == (2, 24, 24, 16)


@pytest.mark.parametrize("shape", [(24, 24, 16, 2), (24, 24, 16, 1, 3), (24, 24)])
def test_other_than_three_axes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write_pair(tmp_path, image=np.zeros(shape, np.float32))
    with pytest.raises(
        CaseError, match=rf"the image is {len(shape)}D .* a 3D volume is expected, one file per channel"
    ):
        load(tmp_path)


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_one_to_three_slices_are_refused_as_a_localizer(tmp_path: Path, slices: int) -> None:
    write_pair(tmp_path, image=np.ones((24, 24, slices), np.float32))
    with pytest.raises(CaseError, match=r"at least 4 voxels per side are needed. Is it a localizer or a single slice"):
        load(tmp_path)


def test_four_slices_are_a_volume(tmp_path: Path) -> None:
    image, label = blob((24, 24, 4))
    assert load(write_pair(tmp_path, image, label)).image.shape == (1, 24, 24, 4)


@pytest.mark.parametrize(("units", "factor"), [("meter", 0.001), ("micron", 1000.0), ("mm", 1.0), ("unknown", 1.0)])
def test_sizes_are_converted_to_millimetres(tmp_path: Path, units: str, factor: float) -> None:
    affine = np.diag([2.0, 2.5, 3.2, 1.0])
    affine[:3, 3] = (-10, 20, 30)
    expected = load(write_pair(tmp_path, affine=affine))
    scaled = np.diag([factor, factor, factor, 1.0]) @ affine
    write_volume(tmp_path / "images" / "a.nii.gz", blob()[0], scaled, units)
    found = load(tmp_path)
    assert torch.allclose(found.image, expected.image, atol=1e-3)
    assert torch.allclose(found.original.affine, expected.original.affine, rtol=1e-6)
    assert bool(found.notes) == (factor != 1.0)
    assert all("converted to mm" in note for note in found.notes)


@pytest.mark.parametrize(
    ("spacing", "units", "says"),
    [
        (
            (2000.0, 2000.0, 2000.0),
            "mm",
            r"4.8e\+04 x 4.8e\+04 x 3.2e\+04 mm with voxels of 2000 x 2000 x 2000",
        ),
        ((2.0, 2.0, 2.0), "meter", "voxels of 2000 x 2000 x 2000 mm, which no patient does"),
        ((2.0, 2.0, 2.0), "micron", "voxels of 0.002 x 0.002 x 0.002 mm, which no patient does"),
        ((2.0, 2.0, 60.0), "mm", "Accepted are 5 to 3000 mm along the longest side and voxels up to 50 mm"),
        ((130.0, 2.0, 2.0), "mm", "Correct the voxel size or the unit in its header"),
        ((0.2, 0.2, 0.2), "mm", "measures 4.8 x 4.8 x 3.2 mm"),
    ],
)
def test_an_implausible_size_is_refused(
    tmp_path: Path, spacing: tuple[float, float, float], units: str, says: str
) -> None:
    write_pair(tmp_path)
    write_volume(tmp_path / "images" / "a.nii.gz", blob()[0], np.diag([*spacing, 1.0]), units)
    with pytest.raises(CaseError, match=says):
        load(tmp_path)


def _header_only(path: Path, shape: tuple[int, int, int], spacing: float) -> None:
    """Write a file whose header promises voxels that are not there: reading them would fail, or fill the memory."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header.set_sform(np.diag([spacing, spacing, spacing, 1.0]), code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path.with_suffix("").unlink(missing_ok=True)
    path.write_bytes(header.binaryblock + bytes(4))


@pytest.mark.parametrize(
    ("shape", "spacing", "says"),
    [
        ((30_000, 30_000, 30_000), 0.05, r"would take 1.08e\+05 GB of memory, storage.memory_gb allows 4"),
        ((60, 60, 60), 45.0, r"would take 9.84 GB.*voxels of 45 x 45 x 45 mm.*about \(1350, 1350, 1350\)"),
    ],
)
def test_a_scan_beyond_the_sites_memory_is_refused_by_its_header(
    tmp_path: Path, shape: tuple[int, int, int], spacing: float, says: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    _header_only(tmp_path / "images" / "a.nii", shape, spacing)
    with pytest.raises(CaseError, match=says):
        load(tmp_path, memory_gb=4.0)


def test_the_memory_limit_counts_channels_and_the_plans_grid_along_its_axes(tmp_path: Path) -> None:
    turned = np.zeros((4, 4))
    turned[0, 2], turned[1, 0], turned[2, 1], turned[3, 3] = 2.0, 2.0, 2.0, 1.0  # stored along A, S, R
    for k in range(2):
        write_volume(tmp_path / "images" / f"a_000{k}.nii.gz", blob()[0], turned)
    write_volume(tmp_path / "labels" / "a.nii.gz", blob()[1], turned)
    plan = ("task.channels=[t1, t2]", "data.spacing_mm=[1.0, 2.0, 2.0]")
    needed_gb = 2 * (32 * 24 * 24) * 4 / 1e9  # 16 voxels of 2 mm run to the right: 32 of 1 mm
    assert 0.95 * needed_gb < load(tmp_path, *plan, memory_gb=needed_gb).image.nbytes / 1e9 <= needed_gb
    with pytest.raises(CaseError, match=r"about \(32, 24, 24\)"):
        load(tmp_path, *plan, memory_gb=0.99 * needed_gb)


@pytest.mark.parametrize("what", ["image", "label"])
@pytest.mark.parametrize(
    ("volume", "says"),
    [(np.zeros((24, 24, 16), RGB), r"in colour \(RGB\)"), (np.zeros((24, 24, 16), np.complex64), "complex")],
)
def test_colours_and_complex_numbers_are_refused_in_one_sentence(
    tmp_path: Path, what: str, volume: Any, says: str
) -> None:
    write_pair(tmp_path, **{what: volume})
    with pytest.raises(CaseError, match=rf"^a: the {what} is {says}; one real number per voxel is expected") as raised:
        load(tmp_path)
    assert not any(word in str(raised.value) for word in ("dtype", "numpy", "Error", "cast"))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_pair(tmp_path) / "images" / "a.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CaseError, match="a: the image file cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a scan", bytes(400)])
def test_a_file_that_is_no_nifti_is_refused(tmp_path: Path, content: bytes) -> None:
    (write_pair(tmp_path) / "images" / "a.nii.gz").write_bytes(content)
    with pytest.raises(CaseError, match="a: the image file cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("affine", [np.diag([2.0, 0.0, 2.0, 1.0]), np.diag([2.0, np.nan, 2.0, 1.0])])
def test_a_header_without_voxel_size_is_refused(tmp_path: Path, affine: Any) -> None:
    write_pair(tmp_path)
    image = nib.Nifti1Image(blob()[0], AFFINE)
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
    image.header["sform_code"] = 1
    path = tmp_path / "images" / "a.nii.gz"
    path.unlink()
    raw = image.header.copy()
    raw["vox_offset"], raw["magic"] = 352, b"n+1"
    (tmp_path / "images" / "a.nii").write_bytes(raw.binaryblock + bytes(4) + blob()[0].tobytes(order="F"))
    with pytest.raises(CaseError, match="the image has no usable affine"):
        load(tmp_path)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("claims", ["offset", "extension"])
def test_a_gzip_bomb_in_a_headers_extension_is_not_inflated(tmp_path: Path, kind: Any, claims: str) -> None:
    """nibabel reads as many bytes of extensions as the header, or the extension, claims."""
    content = bytearray(kind(np.zeros((8, 8, 8), np.int16), np.eye(4) * 2).to_bytes())
    start, place, form = (352, 108, "<f") if kind is nib.Nifti1Image else (544, 168, "<q")
    size = 200_000_000
    content[place : place + struct.calcsize(form)] = struct.pack(form, size if claims == "offset" else start + 160)
    content[start - 4] = 1
    path = tmp_path / "a.nii.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(bytes(content[:start]) + struct.pack("<ii", size - start, 6))
        for _ in range(21):
            file.write(bytes(10_000_000))
    tracemalloc.start()
    with pytest.raises(CaseError, match="extensions are larger than 64 MB"):
        open_nifti(path, "a", "image")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_header_with_an_extension_is_read(tmp_path: Path) -> None:
    image = nib.Nifti1Image(blob()[0], AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100_000))
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(open_nifti(tmp_path / "a.nii.gz", "a", "image").voxels(), blob()[0])
