"""Hostile files cost a sentence: never the process, the machine's memory, or a file outside of the folder."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intake.candidates import Wishes
from intake.files import read_labels, read_volume
from intake.guards import Limits, Request, Worker, inside, read_json
from intake.h5 import read_h5
from intake.layouts import layout_of
from intake.manifest import read_manifest
from intake.volume import IntakeError
from tests.conftest import blob, write_nifti
from tests.intake.dicoms import write_series


def act(request: Request) -> dict[str, Any]:
    """What a decoder may do to the process that it runs in."""
    match request["do"]:
        case "hang":
            time.sleep(60)
        case "crash":
            os.abort()
        case "eat":
            np.ones(4 << 30, dtype=np.uint8)
        case "raise":
            raise ZeroDivisionError("odd")
    return {"pid": os.getpid()}


@pytest.mark.parametrize(
    ("deed", "sentence"),
    [
        ("hang", "longer than 1 seconds"),
        ("crash", "ended unexpectedly"),
        ("eat", "more than 1.0 GiB"),
        ("raise", "odd"),
    ],
)
def test_a_decoder_that_misbehaves_costs_one_answer(deed: str, sentence: str) -> None:
    with Worker(act, Limits(seconds=1, memory_bytes=1 << 30)) as worker:
        with pytest.raises(IntakeError, match=sentence):
            worker.call({"do": deed})
        assert worker.call({"do": "nothing"})["pid"] != os.getpid()


def test_a_header_that_claims_too_many_voxels_is_refused_before_any_is_read(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    content[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], dtype="<i2").tobytes()
    for name, packed in (("x.nii", bytes(content)), ("x.nii.gz", gzip.compress(bytes(content)))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(IntakeError, match="claims the shape"):
            read_volume(tmp_path / name)


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(image.to_bytes() + bytes(200_000_000)))
    assert read_volume(tmp_path / "x.nii.gz").geometry.shape == (4, 4, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e30])
def test_absurd_affines_are_refused(tmp_path: Path, bad: float) -> None:
    content = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes())
    content[320:324] = np.array([bad], dtype="<f4").tobytes()  # the third column of srow_z
    (tmp_path / "x.nii").write_bytes(bytes(content))
    with pytest.raises(IntakeError, match="not usable"):
        read_volume(tmp_path / "x.nii")


@pytest.mark.parametrize("name", ["../../secret.raw", "/etc/passwd", "LIST", "slice%03d.raw"])
def test_a_header_may_not_name_voxels_elsewhere(tmp_path: Path, name: str) -> None:
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "DimSize = 4 4 4",
        "ElementType = MET_UCHAR",
        f"ElementDataFile = {name}",
    ]
    (tmp_path / "x.mhd").write_text("\n".join(lines) + "\n")
    with pytest.raises(IntakeError, match="only a file beside the header"):
        read_volume(tmp_path / "x.mhd")
    (tmp_path / "x.nhdr").write_text(
        f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: {name}\n"
    )
    with pytest.raises(IntakeError, match="only a file beside the header"):
        read_volume(tmp_path / "x.nhdr")


META = b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"
NRRD = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n"
ELSEWHERE = {
    "colon.mhd": META + b"ElementDataFile: ../secret.raw\n",
    "two-separators.mhd": META + b"ElementDataFile := beside.raw\n",
    "attached.mha": META + b"ElementDataFile = beside.raw\n",
    "after-blank-lines.mhd": META + b"\n\nElementDataFile = ../secret.raw\n",
    "after-comments.mhd": META + b"Comment = x\n" * 20_000 + b"ElementDataFile = ../secret.raw\n",
    "after-a-decoy.mhd": META
    + b"Comment = ElementDataFile = LOCAL\n"
    + b"C = x\n" * 300_000
    + b"ElementDataFile = ../s",
    "after-no-field.mhd": META + b"junk\nElementDataFile = beside.raw\n",
    "carriage-returns.mhd": META.replace(b"\n", b"\r") + b"ElementDataFile = ../secret.raw\r",
    "after-comments.nhdr": NRRD + b"# x\n" * 20_000 + b"data file: ../secret.raw\n",
    "endless.nhdr": NRRD + b"# x\n" * 300_000 + b"data file: ../secret.raw\n",
    "carriage-returns.nhdr": NRRD.replace(b"\n", b"\r\n") + b"DataFile: ../secret.raw\r\n",
    "attached.nrrd": NRRD + b"data file: beside.raw\n",
    "parent.nhdr": NRRD + b"data file: ..\n",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_spelling_of_a_header_leads_to_voxels_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(64))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "beside.raw").write_bytes(bytes(64))
    (tmp_path / "in" / name).write_bytes(ELSEWHERE[name])
    with pytest.raises(IntakeError, match=r"beside the header|header is longer|no line ElementDataFile"):
        read_volume(tmp_path / "in" / name)


@pytest.mark.parametrize("suffix", [".mhd", ".mha", ".nhdr", ".nrrd"])
def test_headers_as_itk_writes_them_are_read(tmp_path: Path, suffix: str) -> None:
    voxels = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    image = sitk.GetImageFromArray(voxels)
    image.SetMetaData("note", "kept: a = b")
    for compressed in (False, True):
        sitk.WriteImage(image, tmp_path / f"x{suffix}", compressed)
        found = read_volume(tmp_path / f"x{suffix}")
        np.testing.assert_array_equal(found.voxels, voxels.transpose(2, 1, 0))


def test_a_file_is_read_as_what_its_suffix_says(tmp_path: Path) -> None:
    path = write_series(tmp_path)[0]
    for suffix in (".mha", ".nrrd"):
        shutil.copy(path, tmp_path / f"x{suffix}")
        with pytest.raises(IntakeError):
            read_volume(tmp_path / f"x{suffix}")


def test_links_and_paths_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    secret = write_nifti(tmp_path / "secret.nii.gz", blob()[0])
    (tmp_path / "in" / "x.nii.gz").symlink_to(secret)
    with pytest.raises(IntakeError, match="leads out of the folder"):
        inside(tmp_path / "in", tmp_path / "in" / "x.nii.gz")
    write_nifti(tmp_path / "in" / "imagesTr" / "a.nii.gz", blob()[0])
    entries = [{"image": "../secret.nii.gz"}, {"image": str(secret)}, {"image": "x.nii.gz"}, {"image": 3}, "x"]
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"training": entries}))
    found = layout_of(tmp_path / "in", "decathlon").find(tmp_path / "in", Wishes())
    assert not found.candidates
    assert len(found.left_out) == 5


def test_an_h5_dataset_in_another_file_is_not_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["image"] = blob()[0]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["image"] = h5py.ExternalLink("secret.h5", "image")
    with pytest.raises(IntakeError, match="a link to elsewhere"):
        read_h5(tmp_path / "x.h5", (1, 1, 1))
    with h5py.File(tmp_path / "y.h5", "w") as file:
        layout = h5py.VirtualLayout((24, 24, 16), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "image", (24, 24, 16))
        file.create_virtual_dataset("image", layout)
    with pytest.raises(IntakeError, match="lies in another file"):
        read_h5(tmp_path / "y.h5", (1, 1, 1))


def test_deep_or_large_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(IntakeError, match="nested more than"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "large.json").write_text(json.dumps("x" * 2000))
    with pytest.raises(IntakeError, match="larger than"):
        read_json(tmp_path / "large.json", 1000)


@pytest.mark.parametrize("inner", ['"]"', '"\\\\"', '"\\""', '"a"'])
def test_brackets_in_strings_hide_no_depth(tmp_path: Path, inner: str) -> None:
    for depth, refused in ((30, False), (40, True)):
        (tmp_path / "x.json").write_text(f"[{inner}," * depth + "1" + "]" * depth)
        if refused:
            with pytest.raises(IntakeError, match="nested more than"):
                read_json(tmp_path / "x.json")
        else:
            assert read_json(tmp_path / "x.json")


def test_a_string_that_never_ends_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('"' + '\\"' * 3_000_000)
    start = time.monotonic()
    with pytest.raises(IntakeError, match="no valid JSON"):
        read_json(tmp_path / "x.json")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "described",
    [
        {"training": [{"image": "a.nii.gz"}], "test": 5},
        {"training": [{"image": "a.nii.gz"}], "modality": {str(k): "x" for k in range(101)}},
        {"training": [{"image": "a.nii.gz"}], "test": {"a": 1}},
        {"training": [{}], "labels": {"9" * 5000: "a"}},
        {"training": [{"image": "\ud800"}], "labels": {"a": "9" * 5000}},
        {"training": 5},
        {"channel_names": {str(k): "x" for k in range(101)}},
        ["training"],
    ],
)
@pytest.mark.parametrize("layout", ["decathlon", "nnunet", "auto"])
def test_a_dataset_json_of_another_form_costs_a_sentence(tmp_path: Path, described: Any, layout: str) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    try:
        found = layout_of(tmp_path, layout).find(tmp_path, Wishes())
    except IntakeError as error:
        assert str(error).startswith("dataset.json")  # noqa: PT017
        return
    assert not found.candidates


def test_a_dataset_json_may_not_name_channels_by_the_million(tmp_path: Path) -> None:
    write_nifti(tmp_path / "imagesTr" / "a.nii.gz", blob()[0])
    described = {"training": [{"image": "imagesTr/a.nii.gz"}], "modality": {str(k): "x" for k in range(101)}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    for layout in ("decathlon", "nnunet"):
        with pytest.raises(IntakeError, match="names 101 channels; at most 100"):
            layout_of(tmp_path, layout).find(tmp_path, Wishes())


@pytest.mark.parametrize("folder", ["images", "labels", "imagesTr", "labelsTr"])
def test_a_folder_that_is_a_link_to_elsewhere_is_not_followed(tmp_path: Path, folder: str) -> None:
    write_nifti(tmp_path / "secret" / "x.nii.gz", blob()[0])
    for name in ("images", "imagesTr"):
        write_nifti(tmp_path / "in" / name / "x.nii.gz", blob()[0])
    shutil.rmtree(tmp_path / "in" / folder, ignore_errors=True)
    if folder.endswith("Tr"):
        (tmp_path / "in" / "dataset.json").write_text("{}")
    (tmp_path / "in" / folder).symlink_to(tmp_path / "secret")
    with pytest.raises(IntakeError, match="leads out of the folder"):
        layout_of(tmp_path / "in", "auto").find(tmp_path / "in", Wishes())


@pytest.mark.parametrize("folder", ["images", "imagesTr"])
def test_what_lies_beside_the_scans_is_listed(tmp_path: Path, folder: str) -> None:
    secret = write_nifti(tmp_path / "secret.nii.gz", blob()[0])
    write_nifti(tmp_path / "in" / folder / "x.nii.gz", blob()[0])
    (tmp_path / "in" / folder / "y.nii.gz").symlink_to(secret)
    (tmp_path / "in" / folder / "IM0001").write_bytes(b"DICM")
    if folder.endswith("Tr"):
        (tmp_path / "in" / "dataset.json").write_text("{}")
    found = layout_of(tmp_path / "in", "auto").find(tmp_path / "in", Wishes())
    assert len(found.candidates) == 1
    reasons = dict(found.left_out)
    assert "leads out of the folder" in reasons["y.nii.gz"]
    assert "no volume file" in reasons["IM0001"]


def test_labels_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "x.nii.gz", blob()[0])
    with pytest.raises(IntakeError, match="no whole numbers"):
        read_labels(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
_CASE = st.fixed_dictionaries(
    {
        "case": st.just("p1-1") | st.text(max_size=12) | _JSON,
        "patient": st.just("p1") | _JSON,
        "channels": st.lists(
            st.fixed_dictionaries(
                {"file": st.sampled_from(["images/a.nii.gz", "../x", "/etc/x", "images/../../x"]) | _JSON}
            ),
            max_size=2,
        ),
        "label": st.none() | _JSON,
        "source": st.just("0" * 64) | _JSON,
        "settings": st.just("0" * 64) | _JSON,
    }
)
_MANIFEST = st.fixed_dictionaries({"version": st.just(1) | _JSON, "cases": st.lists(_CASE, max_size=3) | _JSON})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=_JSON | st.fixed_dictionaries({"version": st.just(1) | _JSON, "cases": st.lists(_CASE, max_size=3) | _JSON})
)
def test_any_json_is_a_manifest_or_refused_with_a_sentence(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(content))
    try:
        manifest = read_manifest(path)
    except IntakeError:
        return
    assert all(".." not in each.file for case in manifest.cases for each in case.channels)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=12))
def test_a_nifti_header_with_any_bytes_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)).to_bytes())
    for place, value in changes:
        content[place] = value
    path = tmp_path / "x.nii"
    path.write_bytes(bytes(content))
    try:
        volume = read_volume(path, Limits(voxels=1_000_000))
    except IntakeError:
        return
    assert volume.voxels.shape == volume.geometry.shape
