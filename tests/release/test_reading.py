"""Scans come out of the child that reads them as they are in their files; whatever else it may say is refused."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from intake.conversion import hand_over
from intake.files import read_volume
from intake.guards import Limits, Request
from intake.volume import IntakeError
from release.inputs import Input, find_inputs
from release.reading import ScanReader
from tests.conftest import blob, tiny_plan, write_nifti

OBLIQUE = np.array([[0.0, -1.9, 0.3, 11.0], [1.4, 0.1, 0.2, -7.0], [0.2, 0.3, 2.4, 3.0], [0, 0, 0, 1]])


def _scan(folder: Path, channels: int = 1) -> Input:
    for k in range(channels):
        write_nifti(folder / f"case_000{k}.nii.gz", blob((12, 10, 8), seed=k)[0], OBLIQUE)
    plan = tiny_plan(f"task.channels=[{', '.join('abc'[:channels])}]")
    return find_inputs(folder, plan, "auto", {})[0][0]


def test_every_channel_comes_as_it_is_in_its_file_and_nothing_stays_open(reader: ScanReader, tmp_path: Path) -> None:
    scan = _scan(tmp_path, 2)
    reader.read(scan)
    before = len(os.listdir("/proc/self/fd"))
    stack, grid, notes = reader.read(scan)
    assert len(os.listdir("/proc/self/fd")) == before
    expected = [read_volume(tmp_path / f"case_000{k}.nii.gz") for k in range(2)]
    np.testing.assert_array_equal(stack, np.stack([each.voxels for each in expected]))
    assert (stack.dtype, stack.flags.c_contiguous, stack.flags.writeable) == (np.float32, True, True)
    assert torch.equal(grid.affine, expected[0].geometry.affine)
    assert (grid.shape, notes) == ((12, 10, 8), [])


def test_the_memory_that_is_allowed_is_held_against_the_headers_of_all_channels(tmp_path: Path) -> None:
    """25 million voxels of four bytes may be read: not 27, and in three channels not three times 9."""
    with ScanReader(memory_gb=0.1) as reader:
        for side, channels in ((300, 1), (210, 3)):
            folder = tmp_path / str(side)
            scan = _scan(folder, channels)
            nib.save(nib.Nifti1Image(np.zeros((side,) * 3, np.uint8), np.eye(4)), folder / "case_0000.nii.gz")
            with pytest.raises(IntakeError, match="claims the shape"):
                reader.read(scan)


def _swell(request: Request) -> dict[str, Any]:
    """Take 400 MB to read any scan, as a file that says nothing of it in its header can."""
    np.ones(400_000_000, np.uint8)
    return hand_over(request)


def test_a_scan_may_take_no_more_memory_to_read_than_is_allowed(tmp_path: Path) -> None:
    scan = _scan(tmp_path)
    with ScanReader(memory_gb=0.2, entry=_swell) as reader, pytest.raises(IntakeError, match=r"more than 0\.2 GiB"):
        reader.read(scan)
    with ScanReader(memory_gb=0.8, entry=_swell) as reader:
        assert reader.read(scan)[0].shape == (1, 12, 10, 8)


def _misbehave(request: Request) -> dict[str, Any]:
    """Answer as a decoder might that a file has taken over; what it does is told by the scan's folder."""
    told = hand_over(request)
    match Path(request["channels"][0]["paths"][0]).parent.name:
        case "larger":
            told["shape"][0] *= 2
        case "smaller":
            told["shape"][0] //= 2
        case "flat":
            told["affine"][2] = [0.0, 0.0, 0.0, 0.0]
        case "infinite":
            told["affine"][0][0] = math.inf
        case "negative":
            told["shape"] = [-12, -10, 8]
        case "huge":
            told["shape"] = [1 << 40, 1 << 40, 1]
        case "nothing":
            del told["shape"]
        case "text":
            told["affine"] = "x"
        case "silent":
            time.sleep(60)
    return told


@pytest.fixture(scope="module")
def misled() -> Iterator[ScanReader]:
    """Return a reader whose child misbehaves."""
    with ScanReader(limits=Limits(seconds=4), entry=_misbehave) as reader:
        yield reader


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("larger", "other voxels than it said"),
        ("smaller", "other voxels than it said"),
        ("flat", "not usable"),
        ("infinite", "gave no usable answer"),
        ("negative", "claims the shape"),
        ("huge", "claims the shape"),
        ("nothing", "gave no usable answer"),
        ("text", "gave no usable answer"),
        ("silent", "longer than 4 seconds"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(misled: ScanReader, tmp_path: Path, deed: str, said: str) -> None:
    with pytest.raises(IntakeError, match=said):
        misled.read(_scan(tmp_path / deed))
