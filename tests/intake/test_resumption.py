"""An import that is killed, doubled, out of disk or given another key: nothing is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import shutil
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
from intake import importing
from intake.candidates import Candidate, Listing, Source
from intake.choices import Choices
from intake.conversion import convert
from intake.guards import Worker
from intake.importing import Import, Outcome, Settings, check_apart
from intake.manifest import read_manifest
from intake.volume import IntakeError
from tests.conftest import blob, write_nifti
from tests.intake.dicoms import write_rtstruct, write_series

_worker = Worker(convert)


@pytest.fixture(scope="module", autouse=True)
def _one_worker() -> Iterator[None]:
    """Let all imports share one child process, whose start takes seconds."""
    with _worker:
        yield


def run(source: Path, out: Path, layout: str = "auto", **changes: Any) -> list[Outcome]:
    usual: dict[str, Any] = {"plan": None, "classes": None, "channels": [], "spacing": None, "partial_labels": "refuse"}
    choices = Choices.of(**(usual | {"patient": None, "labels": None, "key": None} | changes))
    return Import(out, choices.settings).run(choices.find(source, layout), worker=_worker)


def _scans(folder: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        write_nifti(folder / f"{name}.nii.gz", blob(seed=k)[0])
    return folder


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_second_import_into_the_folder_waits_for_nobody_and_says_why(tmp_path: Path) -> None:
    _scans(tmp_path / "in", *(f"s{k}" for k in range(5)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cli.main", "import", str(tmp_path / "in"), "-o", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (out / "private" / "pseudonyms.key").exists():
            time.sleep(0.01)
        refused = ""
        while first.poll() is None and time.monotonic() < until and not refused:
            try:
                Import(out, Settings()).run(Listing(()), worker=_worker)
            except IntakeError as error:
                refused = str(error)
        assert "another import into this folder is running" in refused
        assert first.wait(120) == 0
    finally:
        first.kill()
    assert len(read_manifest(out / "manifest.json").cases) == 5
    assert {each.state for each in run(tmp_path / "in", out)} == {"unchanged"}


def test_what_a_killed_write_left_is_swept_up(tmp_path: Path) -> None:
    source = _scans(tmp_path / "in", "a")
    (outcome,) = run(source, tmp_path / "out")
    torn = tmp_path / "out" / "images" / f".{outcome.case}.nii.gz.0123456789ab"
    torn.write_bytes(b"half")
    (tmp_path / "out" / "images" / ".keep").write_bytes(b"")
    run(source, tmp_path / "out")
    assert _names(tmp_path / "out" / "images") == {f"{outcome.case}.nii.gz", ".keep"}


def test_a_full_disk_ends_the_import_with_a_sentence_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write more than so many bytes, and says that little is free."""
    source = _scans(tmp_path / "in", "a", "b", "c")
    noise = np.random.default_rng(0).integers(0, 60_000, (64, 64, 64)).astype(np.uint16)
    write_nifti(source / "b.nii.gz", noise)
    out = tmp_path / "out"
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); from cli.main import app; app()"
    )
    command = [sys.executable, "-c", limited, "import", str(source), "-o", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    states = {each["scan"]: each for each in json.loads(done.stdout)["outcomes"]}
    assert [states[name]["state"] for name in "abc"] == ["new", "failed", "new"]
    assert "it cannot be written (File too large)" in states["b"]["remarks"][0]
    assert len(list((out / "images").iterdir())) == 2

    monkeypatch.setattr(importing, "FULL_BYTES", 1 << 62)
    (source / "b.nii.gz").write_bytes(b"junk")
    with pytest.raises(OSError, match="No space left"):
        run(source, out)
    assert len(read_manifest(out / "manifest.json").cases) == 2


def test_another_key_is_refused_where_scans_have_pseudonyms(tmp_path: Path) -> None:
    source = _scans(tmp_path / "in", "a")
    run(source, tmp_path / "out")
    other = tmp_path / "other.key"
    other.write_text("ab" * 32)
    with pytest.raises(IntakeError, match="imported with another key"):
        run(source, tmp_path / "out", key=other)
    key = tmp_path / "out" / "private" / "pseudonyms.key"
    content = key.read_text()
    key.unlink()
    with pytest.raises(IntakeError, match="imported with another key"):
        run(source, tmp_path / "out")
    assert not key.exists()
    key.write_text(content)
    assert run(source, tmp_path / "out")[0].state == "unchanged"


def test_a_pseudonym_that_is_taken_is_noticed_in_a_later_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(_scans(tmp_path / "in", "a"), tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    digest = importing.Pseudonyms.digest

    def colliding(self: Any, *parts: str) -> str:
        return digest(self, parts[0], *("a" for _ in parts[1:]))

    monkeypatch.setattr(importing.Pseudonyms, "digest", colliding)
    (failed,) = run(_scans(tmp_path / "second", "b"), tmp_path / "out")
    assert failed.state == "failed"
    assert "would get one pseudonym" in failed.remarks[0]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_two_scans_of_a_patient_never_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _scans(tmp_path / "in", "p1_a", "p1_b")
    monkeypatch.setattr(importing.Pseudonyms, "case", lambda self, patient, scan: f"{self.patient(patient)}-0")
    outcomes = run(source, tmp_path / "out", patient="^[^_]+")
    assert [each.state for each in outcomes] == ["new", "failed"]
    assert "two scans would get one pseudonym" in outcomes[1].remarks[0]


def test_a_damaged_record_is_made_anew(tmp_path: Path) -> None:
    source = _scans(tmp_path / "in", "a", "b")
    first, _ = run(source, tmp_path / "out")
    record = tmp_path / "out" / "private" / "records" / f"{first.case}.json"
    for content in (b"{}", b"[", b'{"manifest": null}', b"\xff"):
        record.write_bytes(content)
        assert [each.state for each in run(source, tmp_path / "out")] == ["new", "unchanged"]


def test_files_that_a_scan_no_longer_has_are_removed(tmp_path: Path) -> None:
    image, label = blob()
    for k in (0, 1):
        write_nifti(tmp_path / "in" / "images" / f"x_000{k}.nii.gz", image + k)
    write_nifti(tmp_path / "in" / "labels" / "x.nii.gz", label)
    (outcome,) = run(tmp_path / "in", tmp_path / "out", channels=["a=a", "b=b"])
    assert _names(tmp_path / "out" / "images") == {f"{outcome.case}_0000.nii.gz", f"{outcome.case}_0001.nii.gz"}
    assert _names(tmp_path / "out" / "labels") == {f"{outcome.case}.nii.gz"}
    (tmp_path / "in" / "images" / "x_0001.nii.gz").unlink()
    (tmp_path / "in" / "labels" / "x.nii.gz").unlink()
    (again,) = run(tmp_path / "in", tmp_path / "out")
    assert (again.case, again.state, again.labeled) == (outcome.case, "changed", False)
    assert _names(tmp_path / "out" / "images") == {f"{outcome.case}.nii.gz"}
    assert not _names(tmp_path / "out" / "labels")


def test_a_scan_of_which_only_one_channel_could_be_written_anew_is_not_kept(tmp_path: Path) -> None:
    image = blob()[0]
    for k in (0, 1):
        write_nifti(tmp_path / "in" / f"x_000{k}.nii.gz", image + k)
    (outcome,) = run(tmp_path / "in", tmp_path / "out", channels=["a=a", "b=b"])
    second = tmp_path / "out" / "images" / f"{outcome.case}_0001.nii.gz"
    second.unlink()
    second.mkdir()  # cannot be written over
    write_nifti(tmp_path / "in" / "x_0000.nii.gz", image + 5)
    (failed,) = run(tmp_path / "in", tmp_path / "out", channels=["a=a", "b=b"])
    assert failed.state == "failed"
    assert not read_manifest(tmp_path / "out" / "manifest.json").cases
    assert not (tmp_path / "out" / "images" / f"{outcome.case}_0000.nii.gz").exists()


def test_changed_voxels_beside_a_header_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    voxels = np.arange(216, dtype=np.int16).reshape(6, 6, 6)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), tmp_path / "in" / "x.mhd")
    run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "x.raw").write_bytes((voxels + 1).tobytes())
    (outcome,) = run(tmp_path / "in", tmp_path / "out")
    assert outcome.state == "changed"
    saved = np.asarray(nib.load(tmp_path / "out" / "images" / f"{outcome.case}.nii.gz").dataobj)
    np.testing.assert_array_equal(saved, voxels.transpose(2, 1, 0) + 1)


@pytest.mark.parametrize(
    ("source", "out"), [("a", "a"), ("a", "a/out"), ("out/images", "out"), ("out/images/b", "out")]
)
def test_a_source_is_never_written_into(tmp_path: Path, source: str, out: str) -> None:
    _scans(tmp_path / source, "x")
    before = _names(tmp_path / source)
    done = CliRunner().invoke(app, ["import", str(tmp_path / source), "-o", str(tmp_path / out)])
    assert done.exit_code == 2
    assert "choose" in done.stderr
    assert _names(tmp_path / source) == before
    check_apart(tmp_path / source, tmp_path / "elsewhere")


def test_a_damaged_label_costs_the_label_only(tmp_path: Path) -> None:
    write_series(tmp_path / "in", np.zeros((6, 30, 30), dtype=np.int16))
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.c_[30 + 8 * np.cos(angles), 5 + 8 * np.sin(angles), np.full(40, 11.0)]
    write_rtstruct(tmp_path / "in" / "rt", {"gtv": [ring]})
    (whole,) = run(tmp_path / "in", tmp_path / "out")
    assert whole.labeled
    choices = Choices.of(None, None, [], None, "refuse", None, None, None)
    (candidate,) = choices.find(tmp_path / "in", "auto").candidates
    (tmp_path / "in" / "rt").write_bytes(b"\0" * 128 + b"DICM" + b"\x06\0\x01\0OB" + b"\xff" * 40)
    listing = Listing((candidate,))
    (outcome,) = Import(tmp_path / "out", choices.settings).run(listing, worker=_worker)
    assert (outcome.state, outcome.labeled) == ("changed", False)
    assert "taken without its label" in outcome.remarks[-1]


def test_a_name_too_long_for_the_manifest_costs_its_scan_only(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "x.nii.gz", blob()[0])
    source = Source(kind="file", paths=(str(path),), series="x")
    candidates = (
        Candidate(patient="a", scan="a", channels=(source.model_copy(update={"modality": "x" * 99}),)),
        Candidate(patient="b", scan="b", channels=(source,)),
    )
    outcomes = Import(tmp_path / "out", Settings()).run(Listing(candidates), worker=_worker)
    assert [each.state for each in outcomes] == ["failed", "new"]
    assert "cannot be recorded: modality" in outcomes[0].remarks[0]
    assert _names(tmp_path / "out" / "images") == {f"{outcomes[1].case}.nii.gz"}


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    _scans(tmp_path / "in", "a[", "x[b]y[")
    (tmp_path / "in" / "[").mkdir()
    write_series(tmp_path / "dicom" / "a[" / "b]")
    (tmp_path / "dicom" / "x[").mkdir()
    (tmp_path / "dicom" / "x[" / "b].txt").write_text("")
    for source, text in (("in", "x[b]y["), ("dicom", "x[/b].txt")):
        arguments = ["import", str(tmp_path / source), "-o", str(tmp_path / "out"), "--dry-run"]
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert done.exit_code == 0, done
        assert text in done.stdout


def test_patients_with_several_studies_keep_one_pseudonym(tmp_path: Path) -> None:
    for study, patient in (("1", "A"), ("2", "A"), ("3", "B")):

        def tell(dataset: Any, k: int, study: str = study, patient: str = patient) -> None:
            dataset.StudyInstanceUID, dataset.PatientID = f"1.2.{study}", patient
            dataset.FrameOfReferenceUID = f"1.9.{study}"

        write_series(tmp_path / "in" / study, series=f"1.2.{study}.1", change=tell)
    outcomes = run(tmp_path / "in", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert len({each.case for each in outcomes}) == 3
    assert sorted(map([each.patient for each in manifest.cases].count, {each.patient for each in manifest.cases})) == [
        1,
        2,
    ]
    shutil.move(tmp_path / "in" / "2", tmp_path / "in" / "renamed")
    assert {each.state for each in run(tmp_path / "in", tmp_path / "out")} == {"unchanged"}


def test_names_in_another_encoding_are_left_out_with_a_reason(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "good")
    odd = os.fsdecode(b"M\xfcller")
    write_series(tmp_path / "in" / odd, series="1.2.3.9")
    choices = Choices.of(None, None, [], None, "refuse", None, None, None)
    found = choices.find(tmp_path / "in", "auto")
    assert len(found.candidates) == 1
    assert {reason.rpartition(": ")[2] for _, reason in found.left_out} == {
        "its name, or a folder's, is not in UTF-8; rename it."
    }
    done = CliRunner().invoke(app, ["import", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--dry-run", "--json"])
    assert done.exit_code == 0, done
