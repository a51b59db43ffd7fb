"""What a PACS, an anonymiser or an attacker may put into a folder: each is refused alone, with its reason."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import gdcm
import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from intake.candidates import Listing, Wishes
from intake.dicom import headers
from intake.dicom.labels import read_label
from intake.dicom.series import find_series, read_series
from intake.layouts import dicom
from intake.volume import IntakeError
from tests.intake.dicoms import at, ramp, write_rtstruct, write_seg, write_series

REASON = {
    "PALETTE COLOR": ({"PhotometricInterpretation": "PALETTE COLOR"}, "in colour"),
    "far": ({"ImagePositionPatient": [0, 0, 1e300]}, "beyond any scanner"),
    "huge voxels": ({"PixelSpacing": [1e200, 1e200]}, "beyond any scanner"),
}


def _reasons(folder: Path) -> str:
    return " ".join(reason for _, reason in _listing(folder).left_out)


def _listing(folder: Path) -> Listing:
    return dicom.find(folder, Wishes())


@pytest.mark.parametrize("name", REASON)
def test_values_beyond_any_image_cost_their_file_only(tmp_path: Path, name: str) -> None:
    tags, reason = REASON[name]

    def change(dataset: Any, k: int) -> None:
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)

    write_series(tmp_path / "good")
    write_series(tmp_path / "bad", series="1.2.3.5", change=change)
    found = _listing(tmp_path)
    assert len(found.candidates) == 1
    assert len(found.left_out) == 6
    assert reason in _reasons(tmp_path)


def test_a_value_that_cannot_be_converted_costs_its_file_only(tmp_path: Path) -> None:
    """A reference that is text where a sequence belongs is met only when it is used."""
    paths = write_series(tmp_path / "good")
    mask = np.zeros((*ramp().shape, 1), dtype=np.uint8)
    mask[1, 2:5, 3:6, 0] = 1
    write_seg(tmp_path / "seg", paths, mask, ["Blob"])
    content = (tmp_path / "seg").read_bytes()
    tag = struct.pack("<HH", 0x0008, 0x1115)
    place = content.index(tag)
    (tmp_path / "seg").write_bytes(content[: place + 4] + b"LO" + content[place + 6 :])
    found = _listing(tmp_path)
    assert len(found.candidates) == 1
    assert found.candidates[0].label is None
    assert len(found.left_out) == 1


def test_a_series_that_names_two_patients_is_neithers(tmp_path: Path) -> None:
    """Anonymisers have given two patients one UID; half a series each would be a plausible volume."""

    def change(dataset: Any, k: int) -> None:
        dataset.PatientID = "A" if k < 5 else "B"

    write_series(tmp_path, ramp(10), change=change)
    assert not _listing(tmp_path).candidates
    assert "several patients" in _reasons(tmp_path)


@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
def test_a_label_in_another_frame_of_reference_is_left_out(tmp_path: Path, kind: str) -> None:
    paths = write_series(tmp_path / "ct", np.zeros((6, 30, 30), dtype=np.int16))
    if kind == "SEG":
        mask = np.zeros((6, 30, 30, 1), dtype=np.uint8)
        mask[1:3, 2:5, 3:6, 0] = 1
        write_seg(tmp_path / "label", paths, mask, ["Blob"])
    else:
        write_rtstruct(tmp_path / "label", {"Blob": [_circle(at(20, 25, 6), 8)]})
    assert _listing(tmp_path).candidates[0].label is not None
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.FrameOfReferenceUID = "1.2.77"
        dataset.save_as(path)
    (candidate,) = _listing(tmp_path).candidates
    assert candidate.label is None
    assert "its frame of reference is not that of its series" in _reasons(tmp_path)


def _circle(centre: np.ndarray, radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return centre + radius * np.c_[np.cos(angles), np.sin(angles), np.zeros(72)]


@pytest.mark.parametrize("number", [0, 70_000, -3])
def test_regions_may_have_any_number(tmp_path: Path, number: int) -> None:
    write_series(tmp_path / "ct", np.zeros((6, 30, 30), dtype=np.int16))
    write_rtstruct(tmp_path / "rt", {"GTV": [_circle(at(20, 25, 6), 8)], "node": [_circle(at(20, 25, 9), 4)]})
    dataset = pydicom.dcmread(tmp_path / "rt")
    dataset.StructureSetROISequence[0].ROINumber = number
    dataset.ROIContourSequence[0].ReferencedROINumber = number
    dataset.save_as(tmp_path / "rt")
    found = find_series(tmp_path)
    label = read_label(tmp_path / "rt", "RTSTRUCT", found.series[0])
    assert label.names == {1: "GTV", 2: "node"}
    assert [int((label.volume.voxels[:, :, k] == value).sum()) > 9 for k, value in ((2, 1), (3, 2))] == [True, True]


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_compressed_pixels_are_what_they_were(tmp_path: Path, syntax: str) -> None:
    voxels = ramp(4, 64, 64)
    if syntax == JPEGLosslessSV1:  # what most PACS send; pydicom cannot write it
        for path in write_series(tmp_path, voxels):
            _as_lossless_jpeg(path)
    else:
        write_series(tmp_path, voxels, syntax=syntax)
    volume = read_series(find_series(tmp_path).series[0])
    np.testing.assert_array_equal(volume.voxels, (2.0 * voxels - 1000).transpose(2, 1, 0))


def _as_lossless_jpeg(path: Path) -> None:
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def test_an_unknown_compression_is_refused_with_the_files_name(tmp_path: Path) -> None:
    write_series(tmp_path, syntax=RLELossless)
    for path in tmp_path.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.save_as(path)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.9\0", 1))
    with pytest.raises(IntakeError, match="cannot be decoded"):
        read_series(find_series(tmp_path).series[0])


def _deflated(path: Path, extra: int) -> Path:
    """Write a deflated image with so many zeros in a private element before its pixels."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    packed = io.BytesIO()
    dataset.save_as(packed, enforce_file_format=True)
    content = packed.getvalue()
    start = 144 + struct.unpack("<I", content[140:144])[0]
    inner = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    place = inner.index(struct.pack("<HH", 0x0018, 0x0050))
    element = struct.pack("<HH2sHI", 0x0009, 0x1000, b"OB", 0, extra) + bytes(extra)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(inner[:place] + (element if extra else b"") + inner[place:]) + deflate.flush()
    path.write_bytes(content[:start] + body)
    return path


def test_a_deflated_series_is_read_and_a_deflate_bomb_is_not_inflated(tmp_path: Path) -> None:
    for path in write_series(tmp_path):
        _deflated(path, 0)
    found = find_series(tmp_path)
    np.testing.assert_array_equal(read_series(found.series[0]).voxels, (2.0 * ramp() - 1000).transpose(2, 1, 0))
    bomb = _deflated(write_series(tmp_path / "x", ramp(4))[0], 300 << 20)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(IntakeError, match="header of more than 256 MB"):
        headers.read_header(tmp_path, bomb)


def test_a_header_is_read_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path, ramp(4))
    monkeypatch.setattr(headers, "HEADER_SECONDS", 60.0)
    with headers.Metered(next(iter(tmp_path.iterdir())), seconds=-1) as file, pytest.raises(IntakeError, match="long"):
        file.read(4)


def test_files_and_folders_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    """In a process without the rights that an administrator has."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    locked = write_series(tmp_path / "in" / "a")[0]
    write_series(tmp_path / "in" / "closed", series="1.2.3.9")
    locked.chmod(0)
    (tmp_path / "in" / "closed").chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from intake.dicom.series import find_series\n"
        "find_series(Path(sys.argv[1])); os.geteuid() == 0 and os.setuid(65534)\n"
        "print(*(reason for _, reason in find_series(Path(sys.argv[1])).skipped), sep='|')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp", "MPLCONFIGDIR": "/tmp"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    (tmp_path / "in" / "closed").chmod(0o755)
    assert done.stdout.strip().split("|") == [
        "a folder that cannot be listed (Permission denied)",
        "a file that cannot be read (Permission denied)",
    ], done.stderr


def test_a_multi_frame_header_that_claims_too_much_is_refused_in_the_listing(tmp_path: Path) -> None:
    files = write_series(tmp_path / "single")
    enhanced = hd.legacy.LegacyConvertedEnhancedCTImage([pydicom.dcmread(x) for x in files], "1.2.8", 1, "1.2.8.1", 1)
    (tmp_path / "multi").mkdir()
    enhanced.save_as(tmp_path / "multi" / "frames.dcm")
    assert len(_listing(tmp_path / "multi").candidates) == 1
    dataset = pydicom.dcmread(tmp_path / "multi" / "frames.dcm")
    dataset.NumberOfFrames = 2_000_000_000
    dataset.save_as(tmp_path / "multi" / "frames.dcm")
    assert not _listing(tmp_path / "multi").candidates
    assert "claims the shape" in _reasons(tmp_path / "multi")
