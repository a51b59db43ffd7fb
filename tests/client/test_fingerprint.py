"""A site's fingerprint goes through the gate: logged, limited by the site's own file, and no more than agreed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from client.egress import EgressError
from client.fingerprint import write_fingerprint
from client.site_config import SiteConfig
from semisam_core.data.fingerprint import AXES, fingerprint_scalars
from semisam_core.files import read_json_lines
from tests.conftest import blob, tiny_plan, write_nifti

PLAN = tiny_plan("pseudo_labels.generalists=[lite-medsam]")


def _site(folder: Path, scans: int = 6, data: dict[str, Any] | None = None, **egress: Any) -> SiteConfig:
    for k in range(scans):
        image, label = blob(seed=k)
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        write_nifti(folder / "images" / f"secret-{k}.nii.gz", image, affine)
        write_nifti(folder / "labels" / f"secret-{k}.nii.gz", label, affine)
    return SiteConfig.model_validate(
        {
            "version": 1,
            "site": "north",
            "data": {"images": folder / "images", "labels": folder / "labels", "labeled": "all"} | (data or {}),
            "storage": {"folder": folder / "storage"},
            "egress": egress,
        }
    )


def test_what_is_written_was_logged_first_and_names_no_case(tmp_path: Path) -> None:
    config = _site(tmp_path)
    write_fingerprint(config, PLAN, tmp_path / "out.json", {})
    written = json.loads((tmp_path / "out.json").read_text())
    (line,) = read_json_lines(tmp_path / "storage" / "audit.jsonl")
    assert line["kind"] == "fingerprint"
    assert line["scalars"] == written["fingerprint"]
    assert line["plan"] == PLAN.hash
    assert set(written["fingerprint"]) <= set(fingerprint_scalars(PLAN.task))
    assert set(written) == {"version", "site", "task", "fingerprint"}
    assert "secret" not in (tmp_path / "out.json").read_text()


def test_spacing_and_volumes_are_those_of_the_scans(tmp_path: Path) -> None:
    config = _site(tmp_path)
    found: Any = write_fingerprint(config, PLAN, tmp_path / "out.json", {})["fingerprint"]
    assert [found[f"spacing_mm.{axis}.median"] for axis in ("right-left", "inferior-superior")] == [1.0, 2.0]
    volumes = [float(blob(seed=k)[1].sum()) * 2 / 1000 for k in range(6)]
    assert found["volume_ml.blob.median"] == pytest.approx(np.median(volumes), rel=0.05)


def test_scans_of_one_patient_count_once(tmp_path: Path) -> None:
    config = _site(tmp_path)
    same = {f"secret-{k}": "one" for k in range(6)}
    assert write_fingerprint(config, PLAN, tmp_path / "out.json", same)["fingerprint"] == {"patients": 0}


def test_a_site_may_forbid_it_or_ask_for_more_patients(tmp_path: Path) -> None:
    config = _site(tmp_path, fingerprint=False)
    with pytest.raises(EgressError, match="no fingerprint may leave"):
        write_fingerprint(config, PLAN, tmp_path / "out.json", {})
    assert not (tmp_path / "out.json").exists()
    careful = config.model_copy(
        update={"egress": config.egress.model_copy(update={"fingerprint": True, "minimum_patients": 7})}
    )
    assert write_fingerprint(careful, PLAN, tmp_path / "out.json", {})["fingerprint"] == {"patients": 0}


def test_a_bad_scan_costs_only_itself(tmp_path: Path) -> None:
    config = _site(tmp_path, scans=7)
    (tmp_path / "images" / "secret-3.nii.gz").write_bytes(b"junk")
    found: Any = write_fingerprint(config, PLAN, tmp_path / "out.json", {})["fingerprint"]
    assert found["patients"] == 5  # of six, rounded down


def test_without_its_audit_log_nothing_is_written(tmp_path: Path) -> None:
    config = _site(tmp_path)
    (tmp_path / "storage" / "audit.jsonl").mkdir(parents=True)  # cannot be appended to
    with pytest.raises(OSError, match="audit"):
        write_fingerprint(config, PLAN, tmp_path / "out.json", {})
    assert not (tmp_path / "out.json").exists()


def test_scans_for_validation_do_not_shape_the_plan(tmp_path: Path) -> None:
    held_out = [f"secret-{k}" for k in range(5)]
    config = _site(tmp_path, scans=10, data={"validation": held_out})
    for name in held_out:
        image, label = blob(seed=0)
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", image, np.diag([5.0, 5.0, 5.0, 1.0]))
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", label, np.diag([5.0, 5.0, 5.0, 1.0]))
    found: Any = write_fingerprint(config, PLAN, tmp_path / "out.json", {})["fingerprint"]
    assert found["patients"] == 5
    assert found["spacing_mm.right-left.p90"] == 1.0


def test_only_labels_that_are_used_are_read(tmp_path: Path) -> None:
    """Five of eight scans are labeled; the other label files are not NIfTI, which nothing notices."""
    config = _site(tmp_path, scans=8, data={"labeled": [f"secret-{k}" for k in range(5)]})
    for k in range(5, 8):
        (tmp_path / "labels" / f"secret-{k}.nii.gz").write_bytes(b"junk")
    found: Any = write_fingerprint(config, PLAN, tmp_path / "out.json", {})["fingerprint"]
    assert found["patients"] == 5
    assert "volume_ml.blob.median" in found
    channel = PLAN.task.channels[0]
    inside = [np.median(image[label > 0]) for image, label in (blob(seed=k) for k in range(5))]
    assert found[f"foreground.{channel}.median"] == pytest.approx(np.median(inside), rel=0.05)


def test_axes_are_the_patients_however_the_voxels_are_stored(tmp_path: Path) -> None:
    config = _site(tmp_path)
    for k in range(6):
        image, label = blob(seed=k)
        turned = np.array([[0, 0, 2.0, 0], [-1.0, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]])  # P, S, R
        write_nifti(tmp_path / "images" / f"secret-{k}.nii.gz", image, turned)
        write_nifti(tmp_path / "labels" / f"secret-{k}.nii.gz", label, turned)
    found: Any = write_fingerprint(config, PLAN, tmp_path / "out.json", {})["fingerprint"]
    assert [found[f"spacing_mm.{axis}.median"] for axis in AXES] == [2.0, 1.0, 1.5]


def test_a_scan_larger_than_the_sites_memory_is_left_out(tmp_path: Path) -> None:
    config = _site(tmp_path, scans=6, data={"labeled": [f"secret-{k}" for k in range(5)]})
    write_nifti(tmp_path / "images" / "secret-5.nii.gz", np.zeros((64, 64, 64), np.float32), np.eye(4))
    small = config.storage.model_copy(update={"memory_gb": 64**3 * 4 / 1e9 / 2})
    config = config.model_copy(update={"storage": small})
    found: Any = write_fingerprint(config, PLAN, tmp_path / "out.json", {})["fingerprint"]
    assert found["extent_mm.right-left.p90"] == pytest.approx(blob(seed=0)[0].shape[0], abs=3)


def test_the_command_says_why_nothing_is_said(tmp_path: Path) -> None:
    config = _site(tmp_path, minimum_patients=7)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "draft.yaml").write_text(yaml.safe_dump(PLAN.model_dump(mode="json")))
    options = ["--plan", str(tmp_path / "draft.yaml"), "-o", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, ["site", "fingerprint", str(tmp_path / "site.yaml"), *options])
    assert done.exit_code == 0, done.output
    assert "Fewer than 7 patients" in done.output
    assert json.loads((tmp_path / "out.json").read_text())["fingerprint"] == {"patients": 0}
