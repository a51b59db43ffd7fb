"""`semisam import`: one layout, pseudonyms, nothing identifying, nothing lost, nothing done twice."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from cli.main import app
from intake.choices import Choices
from intake.conversion import convert
from intake.guards import Worker
from intake.importing import Import, Outcome
from intake.layouts import LAYOUTS, layout_of
from intake.manifest import read_manifest
from semisam_core.data.cases import find_cases
from semisam_core.data.scans import load_scan
from tests.conftest import blob, tiny_plan, write_nifti
from tests.intake.dicoms import ramp, write_rtstruct, write_seg, write_series

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
SECRETS = ("MRN-4711", "Muster", "Erika", "19420101", "Thorax", "1.2.3.4", "20240101")


def _choices(**changes: Any) -> Choices:
    usual: dict[str, Any] = {"plan": None, "classes": None, "channels": [], "spacing": None, "partial_labels": "refuse"}
    return Choices.of(**(usual | {"patient": None, "labels": None, "key": None} | changes))


_worker = Worker(convert)


@pytest.fixture(scope="module", autouse=True)
def _one_worker() -> Iterator[None]:
    """Let all imports share one child process, whose start takes seconds."""
    with _worker:
        yield


def run(source: Path, out: Path, layout: str = "auto", **changes: Any) -> list[Outcome]:
    choices = _choices(**changes)
    return Import(out, choices.settings).run(choices.find(source, layout), worker=_worker)


def _pacs(folder: Path) -> Path:
    files = write_series(folder / "export")
    mask = np.zeros((*ramp().shape, 1), dtype=np.uint8)
    mask[1:3, 2:5, 3:6, 0] = 1
    write_seg(folder / "export" / "seg", files, mask, ["Blob"])
    return folder / "export"


def _bytes(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_pacs_export_becomes_a_folder_that_a_site_can_train_on(tmp_path: Path) -> None:
    (outcome,) = run(_pacs(tmp_path), tmp_path / "out", classes="blob=3")
    assert (outcome.state, outcome.labeled) == ("new", True)
    found = find_cases(tmp_path / "out" / "images", tmp_path / "out" / "labels", 1, None, [])
    plan = tiny_plan("task.classes=[{name: blob, value: 3}]")
    scan = load_scan(found.cases[0], plan)
    assert found.cases[0].id == outcome.case
    assert scan.label is not None
    assert int((scan.label == 1).sum()) > 0
    label = nib.load(tmp_path / "out" / "labels" / f"{outcome.case}.nii.gz")
    assert np.asarray(label.dataobj).sum() == 3 * 2 * 3 * 3


def test_nothing_that_leaves_the_private_folder_tells_who_the_patient_is(tmp_path: Path) -> None:
    run(_pacs(tmp_path), tmp_path / "out", classes="blob=1")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and "private" not in path.parts:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            for secret in SECRETS:
                assert secret.encode() not in content
                assert secret not in str(path)
    private = tmp_path / "out" / "private"
    assert private.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in private.rglob("*") if path.is_file())
    assert "MRN-4711" in next((private / "records").iterdir()).read_text()


def test_the_source_is_not_altered_and_a_second_run_changes_no_byte(tmp_path: Path) -> None:
    source = _pacs(tmp_path)
    before = _bytes(source)
    run(source, tmp_path / "out", classes="blob=1")
    first = _bytes(tmp_path / "out" / "images") | _bytes(tmp_path / "out" / "labels")
    (outcome,) = run(source, tmp_path / "out", classes="blob=1")
    assert outcome.state == "unchanged"
    assert first == _bytes(tmp_path / "out" / "images") | _bytes(tmp_path / "out" / "labels")
    assert before == _bytes(source)


def test_two_folders_with_one_key_share_pseudonyms_and_others_do_not(tmp_path: Path) -> None:
    source = _pacs(tmp_path)
    first = run(source, tmp_path / "a")
    key = tmp_path / "a" / "private" / "pseudonyms.key"
    assert run(source, tmp_path / "b", key=key)[0].case == first[0].case
    assert run(source, tmp_path / "c")[0].case != first[0].case


def test_a_changed_source_is_imported_anew(tmp_path: Path) -> None:
    image, label = blob()
    path = write_nifti(tmp_path / "in" / "images" / "x.nii.gz", image)
    write_nifti(tmp_path / "in" / "labels" / "x.nii.gz", label)
    run(tmp_path / "in", tmp_path / "out")
    write_nifti(path, image + 1)
    (outcome,) = run(tmp_path / "in", tmp_path / "out")
    assert outcome.state == "changed"
    saved = np.asarray(nib.load(tmp_path / "out" / "images" / f"{outcome.case}.nii.gz").dataobj)
    np.testing.assert_array_equal(saved, image + 1)
    path.touch()
    assert run(tmp_path / "in", tmp_path / "out")[0].state == "unchanged"


def test_one_bad_scan_costs_only_itself(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", blob()[0])
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"\x1f\x8b" + b"junk" * 100)
    states = {each.scan: each.state for each in run(tmp_path / "in", tmp_path / "out")}
    assert states == {"a": "new", "b": "failed", "c": "new"}
    assert len(read_manifest(tmp_path / "out" / "manifest.json").cases) == 2


def test_a_killed_import_goes_on_where_it_was(tmp_path: Path) -> None:
    for k in range(6):
        write_nifti(tmp_path / "in" / f"s{k}.nii.gz", blob(seed=k)[0])
    command = [sys.executable, "-m", "cli.main", "import", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    records = tmp_path / "out" / "private" / "records"
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(records.glob("*.json"))) < 2:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done = {path.stem for path in records.glob("*.json")}
    outcomes = run(tmp_path / "in", tmp_path / "out")
    assert {each.case for each in outcomes if each.state == "unchanged"} == done
    cases = read_manifest(tmp_path / "out" / "manifest.json").cases
    assert len(cases) == 6
    assert {f"images/{path.name}" for path in (tmp_path / "out" / "images").iterdir()} == {
        channel.file for case in cases for channel in case.channels
    }


def test_a_dry_run_lists_without_writing(tmp_path: Path) -> None:
    _pacs(tmp_path)
    (tmp_path / "export" / "report.pdf").write_bytes(b"%PDF")
    arguments = ["import", str(tmp_path / "export"), "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    listed = json.loads(done.stdout)
    assert len(listed["candidates"]) == 1
    assert {"what": "report.pdf", "reason": "no DICOM file"} in listed["left_out"]
    assert not (tmp_path / "out").exists()


def test_a_label_of_a_part_is_refused_or_the_scan_is_cropped_to_it(tmp_path: Path) -> None:
    if not (REAL / "ct").is_dir():
        pytest.skip("the CT is not on this machine")
    image, labels = REAL / "ct" / "ct.nii.gz", REAL / "ct" / "organs.nii.gz"
    (refused,) = run(image, tmp_path / "out", labels=labels)
    assert not refused.labeled
    assert "122 x 101 x 30 of the image's 122 x 101 x 112" in refused.remarks[0]
    (cropped,) = run(image, tmp_path / "out", labels=labels, partial_labels="crop")
    assert cropped.labeled
    scan = nib.load(tmp_path / "out" / "images" / f"{cropped.case}.nii.gz")
    np.testing.assert_array_equal(np.asarray(scan.dataobj), np.asarray(nib.load(image).dataobj)[:, :, :30])


def test_channels_are_chosen_by_the_names_of_their_series(tmp_path: Path) -> None:
    for number, name in ((1, "T1 ax"), (2, "FLAIR ax"), (3, "T2 ax")):

        def tell(dataset: Any, k: int, name: str = name, number: int = number) -> None:
            dataset.SeriesDescription, dataset.SOPInstanceUID = name, f"1.2.3.{number}.{k}"

        write_series(tmp_path / "in" / name, ramp() + number, series=f"1.2.3.{number}", change=tell)
    (outcome,) = run(tmp_path / "in", tmp_path / "out", channels=["flair=FLAIR", "t1=^T1"])
    values = [
        np.asarray(nib.load(tmp_path / "out" / "images" / f"{outcome.case}_000{k}.nii.gz").dataobj).min()
        for k in (0, 1)
    ]
    assert values == [2 * 2 - 1000, 2 * 1 - 1000]


def test_nnunet_decathlon_bids_h5_and_other_files_are_recognised(tmp_path: Path) -> None:
    import h5py

    image, label = blob()
    write_nifti(tmp_path / "nnunet" / "imagesTr" / "c1_0000.nii.gz", image)
    write_nifti(tmp_path / "nnunet" / "imagesTr" / "c1_0001.nii.gz", image * 2)
    write_nifti(tmp_path / "nnunet" / "labelsTr" / "c1.nii.gz", label)
    names = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "blob": 1}}
    (tmp_path / "nnunet" / "dataset.json").write_text(json.dumps(names))
    write_nifti(tmp_path / "decathlon" / "imagesTr" / "c1.nii.gz", np.stack([image, image * 2], -1))
    write_nifti(tmp_path / "decathlon" / "labelsTr" / "c1.nii.gz", label)
    pairs = {"training": [{"image": "./imagesTr/c1.nii.gz", "label": "./labelsTr/c1.nii.gz"}]}
    described = {"modality": {"0": "a", "1": "b"}, "labels": {"0": "background", "1": "blob"}} | pairs
    (tmp_path / "decathlon" / "dataset.json").write_text(json.dumps(described))
    write_nifti(tmp_path / "bids" / "sub-7" / "ses-1" / "anat" / "sub-7_ses-1_T1w.nii.gz", image)
    write_nifti(tmp_path / "bids" / "derivatives" / "x" / "sub-7" / "sub-7_ses-1_dseg.nii.gz", label)
    (tmp_path / "h5" / "CASE").mkdir(parents=True)
    with h5py.File(tmp_path / "h5" / "CASE" / "mri_norm2.h5", "w") as file:
        file["image"], file["label"] = image, label
    (tmp_path / "itk").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(image), tmp_path / "itk" / "x.nrrd")
    wanted = {"nnunet": 2, "decathlon": 2, "bids": 1, "h5": 1, "itk": 1}
    for folder, channels in wanted.items():
        layout = layout_of(tmp_path / folder, "auto")
        assert layout is LAYOUTS["paired" if folder == "itk" else folder]
        (outcome,) = run(tmp_path / folder, tmp_path / "out" / folder, spacing="1,1,2", classes="blob=5")
        assert outcome.state == "new", outcome
        assert len(list((tmp_path / "out" / folder / "images").iterdir())) == channels
        if folder != "itk":
            (written,) = (tmp_path / "out" / folder / "labels").iterdir()
            values = np.unique(np.asarray(nib.load(written).dataobj)).tolist()
            assert values == ([0, 5] if folder in ("nnunet", "decathlon") else [0, 1])


def test_what_else_lies_among_volume_files_is_told(tmp_path: Path) -> None:
    image, label = blob()
    write_nifti(tmp_path / "a.nii.gz", image)
    write_nifti(tmp_path / "labels" / "a.nii.gz", label)
    sitk.WriteImage(sitk.GetImageFromArray(image), tmp_path / "b.mhd")  # and b.raw
    write_series(tmp_path / "dicom")
    (tmp_path / "notes.txt").write_text("x")
    found = _choices().find(tmp_path, "auto")
    assert [each.scan for each in found.candidates] == ["a", "b"]
    assert found.left_out == (
        ("dicom", "a folder among volume files; name it to take what is in it"),
        ("notes.txt", "no volume file (--layout dicom reads DICOM files here instead)"),
    )


def test_an_rtstruct_gives_the_class_of_its_name(tmp_path: Path) -> None:
    write_series(tmp_path / "in", np.zeros((6, 30, 30), dtype=np.int16))
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.c_[30 + 8 * np.cos(angles), 5 + 8 * np.sin(angles), np.full(40, 11.0)]
    write_rtstruct(tmp_path / "in" / "rt", {"BODY": [ring], "gtv": [ring]})
    (outcome,) = run(tmp_path / "in", tmp_path / "out", classes="GTV=4")
    assert outcome.labeled
    assert read_manifest(tmp_path / "out" / "manifest.json").cases[0].label.classes == {4: "GTV"}  # type: ignore[union-attr]


def test_scans_without_any_uid_do_not_take_each_others_place(tmp_path: Path) -> None:
    def anonymised(dataset: Any, _: int) -> None:
        dataset.PatientID = dataset.SeriesInstanceUID = dataset.StudyInstanceUID = ""

    for name in ("a", "b"):
        write_series(tmp_path / "in" / name, change=anonymised)
    outcomes = run(tmp_path / "in", tmp_path / "out")
    assert len({each.case for each in outcomes}) == 2
    assert all("no patient ID" in each.remarks[0] for each in outcomes)
