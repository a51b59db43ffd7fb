"""Many scans: what is done is kept, what fails is told, and no input is ever overwritten."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from intake.choices import channel_patterns
from intake.conversion import hand_over
from intake.guards import Request
from release import predicting
from release.inputs import Input, find_inputs
from release.model import load_model
from release.predicting import Order, predict_all
from release.prediction import Predictor
from release.reading import ScanReader
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan
from tests.conftest import blob, tiny_plan, write_nifti
from tests.intake.dicoms import ramp, write_multi_frame, write_series
from tests.release.runs import TWO_CLASSES, sharp_weights, write_hidden_mass, write_run

CPU = torch.device("cpu")
CT = "task.channels=[ct]"


def _predictor(folder: Path, *assignments: str, gain: float = 2.0) -> Predictor:
    plan = tiny_plan(*assignments)
    return Predictor([load_model(write_run(folder, plan, sharp_weights(plan, gain)))], CPU)


def _scans(folder: Path, count: int = 2) -> Path:
    for k in range(count):
        write_nifti(folder / f"case-{k}.nii.gz", blob(seed=k)[0])
    return folder


def _inputs(source: Path, plan: Plan, **channels: str) -> list[Input]:
    patterns = channel_patterns([f"{name}={pattern}" for name, pattern in channels.items()])
    return find_inputs(source, plan, "auto", patterns)[0]


def _states(records: list[dict[str, Any]]) -> dict[str, str]:
    return {each["name"]: each["state"] for each in records}


def test_what_is_done_is_kept_until_scan_model_or_output_change(reader: ScanReader, tmp_path: Path) -> None:
    predictor, scans, order = _predictor(tmp_path / "a"), _scans(tmp_path / "scans"), Order(tmp_path / "out")

    def again(by: Predictor = predictor, how: Order = order) -> dict[str, str]:
        return _states(predict_all(by, _inputs(scans, by.plan), how, reader=reader))

    assert again() == {"case-0": "done", "case-1": "done"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == ["case-0.json", "case-0.nii.gz", "case-1.json", "case-1.nii.gz"]
    assert again() == {"case-0": "kept", "case-1": "kept"}
    (tmp_path / "out" / "case-1.nii.gz").write_bytes(written["case-0.nii.gz"])
    assert again() == {"case-0": "kept", "case-1": "done"}
    assert (tmp_path / "out" / "case-1.nii.gz").read_bytes() == written["case-1.nii.gz"]  # the same bytes as before
    write_nifti(scans / "case-0.nii.gz", blob(seed=9)[0])
    assert again() == {"case-0": "done", "case-1": "kept"}
    assert again(_predictor(tmp_path / "b", gain=2.1)) == {"case-0": "done", "case-1": "done"}
    assert again(how=Order(tmp_path / "out", uncertainty=True)) == {"case-0": "done", "case-1": "done"}
    assert (tmp_path / "out" / "case-0_uncertainty.nii.gz").exists()


def test_the_record_says_by_what_it_was_made_and_how_large_structures_are(reader: ScanReader, tmp_path: Path) -> None:
    predictor = _predictor(tmp_path / "run", TWO_CLASSES)
    inputs = _inputs(_scans(tmp_path / "scans", 1), predictor.plan)
    predict_all(predictor, inputs, Order(tmp_path / "out"), reader=reader)
    record = json.loads((tmp_path / "out" / "case-0.json").read_text())
    labels = np.asarray(nib.load(tmp_path / "out" / "case-0.nii.gz").dataobj)
    assert record["volumes_ml"] == {
        "left-atrium": pytest.approx((labels == 3).sum() * 0.008),
        "outer-shell": pytest.approx((labels == 5).sum() * 0.008),
    }
    assert record["made_from"]["models"] == [predictor.models[0].sha256]
    assert record["made_from"]["plans"] == [predictor.plan.hash]
    assert record["made_from"]["input"] == inputs[0].sha256


def test_a_detached_headers_voxels_count_as_the_scans_content(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(blob()[0].transpose(2, 1, 0))
    sitk.WriteImage(image, tmp_path / "scan.mhd")
    before = _inputs(tmp_path / "scan.mhd", tiny_plan())[0].sha256
    content = bytearray((tmp_path / "scan.raw").read_bytes())
    content[100] ^= 1
    (tmp_path / "scan.raw").write_bytes(bytes(content))
    assert _inputs(tmp_path / "scan.mhd", tiny_plan())[0].sha256 != before


def test_bad_scans_are_told_and_stop_no_other(
    reader: ScanReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, scans = _predictor(tmp_path / "run"), _scans(tmp_path / "scans", 4)
    (scans / "case-0.nii.gz").write_bytes(gzip.compress(b"no image"))
    write_nifti(scans / "case-1.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    original = Predictor.segment

    def out_of_memory(self: Predictor, stack: Any, grid: Any, name: str, *rest: Any) -> Any:
        if name == "case-2":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, stack, grid, name, *rest)

    monkeypatch.setattr(Predictor, "segment", out_of_memory)
    records = predict_all(predictor, _inputs(scans, predictor.plan), Order(tmp_path / "out"), reader=reader)
    assert _states(records) == {"case-0": "failed", "case-1": "failed", "case-2": "failed", "case-3": "done"}
    assert "cannot be read" in records[0]["error"]
    assert "NaN" in records[1]["error"]
    assert "CUDA out of memory" in records[2]["error"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case-3.json", "case-3.nii.gz"]


def _crash_on_the_second(request: Request) -> dict[str, Any]:
    if "case-1" in request["channels"][0]["paths"][0]:
        os.kill(os.getpid(), signal.SIGSEGV)
    return hand_over(request)


def test_a_scan_that_ends_its_reader_costs_no_other(tmp_path: Path) -> None:
    predictor, scans = _predictor(tmp_path / "run"), _scans(tmp_path / "scans", 3)
    with ScanReader(entry=_crash_on_the_second) as mine:
        records = predict_all(predictor, _inputs(scans, predictor.plan), Order(tmp_path / "out"), reader=mine)
    assert _states(records) == {"case-0": "done", "case-1": "failed", "case-2": "done"}
    assert "the process that read it ended unexpectedly (exit status -11)" in records[1]["error"]


def test_a_scan_that_hides_too_much_beside_its_voxels_costs_no_other(tmp_path: Path) -> None:
    predictor, scans = _predictor(tmp_path / "run"), _scans(tmp_path / "scans")
    write_hidden_mass(scans / "case-0.nii.gz", 700_000_000)
    order = Order(tmp_path / "out", memory_gb=0.6)
    records = predict_all(predictor, _inputs(scans, predictor.plan), order)
    assert _states(records) == {"case-0": "failed", "case-1": "done"}
    assert "its header and extensions are larger than 64 MB" in records[0]["error"]


def test_one_multi_frame_file_is_a_scan_called_like_the_file(reader: ScanReader, tmp_path: Path) -> None:
    predictor = _predictor(tmp_path / "run", CT, "data.spacing_mm=[1.0, 1.0, 1.0]")
    files = write_series(tmp_path / "ct", (100 * ramp(16, 20, 20) % 977).astype(np.int16))
    enhanced = write_multi_frame(tmp_path / "exported" / "IM.1.2.dcm", files)
    inputs = _inputs(enhanced, predictor.plan)
    (single,) = predict_all(predictor, inputs, Order(tmp_path / "out"), reader=reader)
    (stack,) = predict_all(predictor, _inputs(tmp_path / "ct", predictor.plan), Order(tmp_path / "out"), reader=reader)
    assert (single["state"], list(single["outputs"])) == ("done", ["IM.1.2.dcm"])
    assert single["volumes_ml"] == stack["volumes_ml"]
    assert sum(single["volumes_ml"].values()) > 0


def test_a_full_disk_ends_the_work_since_going_on_would_be_in_vain(
    reader: ScanReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, scans = _predictor(tmp_path / "run"), _scans(tmp_path / "scans")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "case-0.nii.gz")

    monkeypatch.setattr(predicting, "write_nifti", full)
    with pytest.raises(OSError, match="No space left"):
        predict_all(predictor, _inputs(scans, predictor.plan), Order(tmp_path / "out"), reader=reader)


def test_outputs_never_lie_among_the_scans(reader: ScanReader, tmp_path: Path) -> None:
    predictor, scans = _predictor(tmp_path / "run"), _scans(tmp_path / "scans")
    before = {path.name: path.read_bytes() for path in scans.iterdir()}
    (tmp_path / "link").symlink_to(scans)
    for out in (scans, tmp_path / "link"):
        with pytest.raises(ConfigError, match="the scans lie in this folder"):
            predict_all(predictor, _inputs(scans, predictor.plan), Order(out), reader=reader)
    assert {path.name: path.read_bytes() for path in scans.iterdir()} == before


def test_scans_whose_outputs_would_have_one_name_get_names_of_their_own(reader: ScanReader, tmp_path: Path) -> None:
    predictor, scans = _predictor(tmp_path / "run"), tmp_path / "scans"
    for k, name in enumerate(("x", "X", "y", "y_uncertainty", "y_disagreement", "a b", "a-b")):
        write_nifti(scans / f"{name}.nii.gz", blob(seed=k)[0])
    records = predict_all(
        predictor, _inputs(scans, predictor.plan), Order(tmp_path / "out", uncertainty=True), reader=reader
    )
    outputs = [name.casefold() for each in records for name in each["outputs"]]
    assert len(outputs) == len(set(outputs)) == 14
    assert {each["state"] for each in records} == {"done"}


def test_channels_are_found_by_number_or_by_the_description_of_their_series(reader: ScanReader, tmp_path: Path) -> None:
    predictor = _predictor(tmp_path / "run", "task.channels=[t1, flair]")
    first, second = blob(seed=0)[0], blob(seed=1)[0]
    for k, volume in enumerate((first, second)):
        write_nifti(tmp_path / "scans" / f"case_000{k}.nii.gz", volume)
    (scan,) = _inputs(tmp_path / "scans", predictor.plan)
    stack = reader.read(scan)[0]
    assert scan.name == "case"
    assert np.array_equal(stack, np.stack([first, second]))

    for k, description in enumerate(("FLAIR sag", "T1 mprage", "T2")):
        voxels = ramp() + 1000 * k
        write_series(tmp_path / "mr" / str(k), voxels, f"1.2.3.{k + 4}", change=_describe(description))
    (found,) = _inputs(tmp_path / "mr", predictor.plan, t1="mprage", flair="^flair")
    stack = reader.read(found)[0]
    assert float(stack[0].min()) - float(stack[1].min()) == 2000  # rescaled by 2: T1 first, as in the plan


def test_a_series_of_another_modality_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    write_series(tmp_path / "ct")
    plan = tiny_plan("task.channels=[lge-mr]")
    inputs, listing = find_inputs(tmp_path / "ct", plan, "auto", {})
    assert not inputs
    assert any("it is CT; the model's channel is lge-mr" in reason for _, reason in listing.left_out)
    assert len(_inputs(tmp_path / "ct", tiny_plan(CT))) == 1
    assert len(find_inputs(tmp_path / "ct", plan, "auto", channel_patterns(["lge-mr=thorax"]))[0]) == 1


def test_a_series_gets_a_dicom_seg_and_other_files_get_nifti(reader: ScanReader, tmp_path: Path) -> None:
    predictor = _predictor(tmp_path / "run", CT, "data.spacing_mm=[1.0, 1.0, 1.0]")
    write_series(tmp_path / "ct", (100 * ramp(16, 20, 20) % 977).astype(np.int16))
    inputs = _inputs(tmp_path / "ct", predictor.plan)
    (record,) = predict_all(predictor, inputs, Order(tmp_path / "out"), reader=reader)
    assert list(record["outputs"]) == ["ct.dcm"]
    (record,) = predict_all(predictor, inputs, Order(tmp_path / "both", "both", uncertainty=True), reader=reader)
    assert list(record["outputs"]) == ["ct.nii.gz", "ct.dcm", "ct_uncertainty.nii.gz"]
    files = _inputs(_scans(tmp_path / "scans", 1), predictor.plan)
    (record,) = predict_all(predictor, files, Order(tmp_path / "out", "dicom-seg"), reader=reader)
    assert record["state"] == "failed"
    assert "needs a DICOM series" in record["error"]


def test_a_series_that_no_seg_can_refer_to_is_refused_before_anything_is_computed(
    reader: ScanReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_study(dataset: Any, number: int) -> None:
        dataset.StudyInstanceUID = ""

    predictor = _predictor(tmp_path / "run", CT)
    write_series(tmp_path / "ct", change=without_study)
    monkeypatch.setattr(Predictor, "segment", lambda *_: pytest.fail("it was computed"))
    (record,) = predict_all(
        predictor, _inputs(tmp_path / "ct", predictor.plan), Order(tmp_path / "out", "both"), reader=reader
    )
    assert record["state"] == "failed"
    assert "Choose --format nifti" in record["error"]
    assert not list((tmp_path / "out").iterdir())


def _describe(text: str) -> Any:
    def change(dataset: Any, number: int) -> None:
        dataset.SeriesDescription, dataset.Modality = text, "MR"

    return change
