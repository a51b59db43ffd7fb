"""NIfTI outputs lie exactly where their scan lies, and hold nothing else of its header."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from intake.files import read_volume
from release.outputs import write_nifti
from semisam_core.data.geometry import Geometry
from tests.release.runs import write_hidden_mass

OBLIQUE = np.array([[0.0, -1.9, 0.3, 11.0], [1.4, 0.1, 0.2, -7.0], [0.2, 0.3, 2.4, 3.0], [0, 0, 0, 1]])
LABELS = (np.arange(4 * 5 * 6).reshape(4, 5, 6) % 7).astype(np.uint8)
GEOMETRY_1, GEOMETRY_2 = slice(252, 328), slice(344, 500)  # codes, quaternion, offsets and rows, in NIfTI-1 and -2


def _scan(path: Path, kind: Any = nib.Nifti1Image, change: Any = None, endianness: str = "<") -> Path:
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    image = kind(np.zeros((4, 5, 6), np.int16), None, header)
    image.set_sform(OBLIQUE, 2)
    image.set_qform(OBLIQUE @ np.diag([1, 1, 1, 1.0]) + np.diag([0, 0, 0, 0.0]), 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"], image.header["aux_file"], image.header["intent_name"] = b"MUSTER", b"ERIKA", b"19420101"
    image.header["db_name" if kind is nib.Nifti1Image else "descrip"] = b"MRN-4711"
    image.header["cal_max"] = 700
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Muster, Erika"))
    if change:
        change(image)
    nib.save(image, path)
    return path


def _only_qform(image: Any) -> None:
    image.set_sform(None, 0)


def _no_form(image: Any) -> None:
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    image.header["pixdim"][1:4] = 1.25, 2.5, 3.75


def _metres(image: Any) -> None:
    image.header.set_xyzt_units("meter")
    image.set_sform(OBLIQUE * [[1e-3], [1e-3], [1e-3], [1]], 1)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("change", [None, _only_qform, _no_form, _metres])
def test_the_geometry_is_the_scans_byte_by_byte(tmp_path: Path, kind: Any, change: Any) -> None:
    source = _scan(tmp_path / "scan.nii", kind, change)
    volume = read_volume(source)
    write_nifti(tmp_path / "out.nii.gz", LABELS, volume.geometry, source)
    part = GEOMETRY_1 if kind is nib.Nifti1Image else GEOMETRY_2
    nib.save(nib.load(tmp_path / "out.nii.gz"), tmp_path / "out.nii")
    assert (tmp_path / "out.nii").read_bytes()[part] == source.read_bytes()[part]
    before, after = nib.load(source), nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(after.affine, before.affine)
    assert np.array_equal(after.header["pixdim"][:4], before.header["pixdim"][:4])
    assert after.header.get_xyzt_units()[0] == before.header.get_xyzt_units()[0]
    assert np.array_equal(np.asarray(after.dataobj), LABELS)
    assert after.get_data_dtype() == np.uint8


def test_a_big_endian_scans_geometry_is_taken_over(tmp_path: Path) -> None:
    source = _scan(tmp_path / "scan.nii", endianness=">")
    write_nifti(tmp_path / "out.nii.gz", LABELS, read_volume(source).geometry, source)
    found = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(found.affine, nib.load(source).affine)
    assert np.array_equal(np.asarray(found.dataobj), LABELS)


def test_no_text_of_the_scans_header_is_taken_over(tmp_path: Path) -> None:
    source = _scan(tmp_path / "scan.nii")
    write_nifti(tmp_path / "out.nii.gz", LABELS, read_volume(source).geometry, source)
    nib.save(nib.load(tmp_path / "out.nii.gz"), tmp_path / "out.nii")
    content = (tmp_path / "out.nii").read_bytes().upper()
    assert not [text for text in (b"MUSTER", b"ERIKA", b"4711", b"1942") if text in content]
    header = nib.load(tmp_path / "out.nii").header
    assert not header.extensions
    assert float(header["cal_max"]) == 0


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_segmentation_of_an_itk_file_lies_on_it(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(LABELS.transpose(2, 1, 0).astype(np.int16))
    image.SetSpacing((0.7, 1.1, 2.3))
    image.SetOrigin((-12.5, 31.0, 7.25))
    image.SetDirection((0.0, 0.8, -0.6, -1.0, 0.0, 0.0, 0.0, 0.6, 0.8))
    sitk.WriteImage(image, tmp_path / f"scan{suffix}")
    write_nifti(tmp_path / "out.nii.gz", LABELS, read_volume(tmp_path / f"scan{suffix}").geometry, None)
    found = sitk.ReadImage(tmp_path / "out.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(found), LABELS.transpose(2, 1, 0))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(found, get)(), getattr(image, get)(), atol=1e-5)


def test_the_same_array_gives_the_same_bytes(tmp_path: Path) -> None:
    grid = Geometry((4, 5, 6), torch.from_numpy(OBLIQUE))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, LABELS.astype(np.float32), grid, None)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_extensions_of_the_scans_header_are_not_loaded(tmp_path: Path) -> None:
    source = write_hidden_mass(tmp_path / "scan.nii.gz", 200_000_000)
    tracemalloc.start()
    write_nifti(tmp_path / "out.nii.gz", LABELS, Geometry((4, 5, 6), torch.eye(4, dtype=torch.float64)), source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii.gz").affine, nib.load(source).affine)
