"""Each fault gives its own finding; a healthy site gives none."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from deployment.invitation import installed_versions
from deployment.site.doctor import examine, worst
from deployment.site.doctor_data import check_storage
from deployment.site.doctor_server import _check_clock
from deployment.site.findings import Finding, Level
from deployment.site.site_folder import SiteFolder
from tests.conftest import blob, write_nifti
from tests.deployment.site.places import change, invite, joined, semisam


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return joined(tmp_path)


def _look(site: Path, server: bool = False) -> list[Finding]:
    return examine(SiteFolder.at(site), Console(quiet=True), True, server)


def _found(findings: list[Finding], subject: str, *levels: Level) -> str:
    wanted = levels or (Level.WARNING, Level.PROBLEM)
    return " ".join(f.sentence for f in findings if f.subject == subject and f.level in wanted)


def test_a_healthy_site_has_no_problems(site: Path) -> None:
    findings = _look(site)
    assert not worst(findings), [f for f in findings if f.level is Level.PROBLEM]
    assert "1 labeled, 2 unlabeled" in _found(findings, "data", Level.OK)


def _nan(data: Path) -> None:
    image, _ = blob()
    image[3, 3, 3] = np.nan
    write_nifti(data / "images" / "case-0.nii.gz", image)


def _truncated(data: Path) -> None:
    path = data / "images" / "case-0.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def _elsewhere(data: Path) -> None:
    _, label = blob()
    write_nifti(data / "labels" / "case-0.nii.gz", label, np.diag([3.0, 2.0, 2.0, 1.0]))


def _nearly_one(data: Path) -> None:
    _, label = blob()
    write_nifti(data / "labels" / "case-0.nii.gz", label * np.float32(0.9999))


def _foreign_value(data: Path) -> None:
    _, label = blob()
    write_nifti(data / "labels" / "case-0.nii.gz", label * 7)


def _no_affine(data: Path) -> None:
    image, _ = blob()
    file = nib.Nifti1Image(image, None)
    file.header.set_sform(np.diag([2.0, 2.0, 0.0, 1.0]), code=1)
    nib.save(file, data / "images" / "case-0.nii.gz")


def _nothing_marked(data: Path) -> None:
    _, label = blob()
    write_nifti(data / "labels" / "case-0.nii.gz", label * 0)


@pytest.mark.parametrize(
    ("plant", "word"),
    [
        (_nan, "NaN"),
        (_truncated, "cannot be read"),
        (_elsewhere, "does not lie on the image"),
        (_nearly_one, "0.9999 were rounded to whole numbers"),
        (_foreign_value, "accept [0, 1]"),
        (_no_affine, "no usable affine"),
        (_nothing_marked, "its label is empty"),
    ],
)
def test_a_bad_case_is_named_with_its_reason(
    site: Path, tmp_path: Path, plant: Callable[[Path], None], word: str
) -> None:
    plant(tmp_path / "data")
    assert word in _found(_look(site), "case case-0")


def test_a_class_absent_from_every_label_is_reported(site: Path, tmp_path: Path) -> None:
    _nothing_marked(tmp_path / "data")
    assert "no label marks blob" in _found(_look(site), "labels")


def test_a_site_without_a_usable_case_is_a_problem(site: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"no scan")
    assert "no case can be used" in _found(_look(site), "data", Level.PROBLEM)


def test_a_missing_folder_is_a_problem(site: Path) -> None:
    change(site, "data.images=/nowhere")
    assert "/nowhere" in _found(_look(site), "data", Level.PROBLEM)


def test_a_mistake_in_the_site_file_is_reported_with_its_key(site: Path) -> None:
    change(site, "data.labelled=all")
    assert "data.labelled" in _found(_look(site), "site.yaml", Level.PROBLEM)


def test_a_site_file_that_names_another_site_is_a_problem(site: Path) -> None:
    change(site, "site=beta")
    assert "alpha" in _found(_look(site), "site.yaml", Level.PROBLEM)


def test_a_modified_copy_of_approved_code_is_a_problem(site: Path) -> None:
    copy = next((site / "storage" / "code").rglob("client/app.py"))
    copy.chmod(0o644)
    copy.write_text("# something else")
    assert "differs from the file that was approved" in _found(_look(site), "code", Level.PROBLEM)


def test_missing_approval_is_a_problem(site: Path) -> None:
    code = json.loads((site / "deployment.json").read_text())["code_hash"]
    semisam("site", "approve", "--folder", site, "--revoke", code)
    assert "none is approved" in _found(_look(site), "code", Level.PROBLEM)


def test_a_private_key_readable_by_others_is_a_problem(site: Path) -> None:
    (site / "keys" / "site-key").chmod(0o644)
    assert "chmod 600" in _found(_look(site), "key", Level.PROBLEM)


def test_storage_is_private_to_its_owner_and_the_doctor_reports_where_it_is_not(site: Path, tmp_path: Path) -> None:
    storage = tmp_path / "elsewhere"
    change(site, f"storage.folder={storage}")
    assert semisam("site", "approve", invite(tmp_path), "--folder", site, "--yes").exit_code == 0
    assert stat.S_IMODE(storage.stat().st_mode) == 0o700
    assert check_storage(storage).level is Level.OK
    storage.chmod(0o755)
    assert f"chmod 700 {storage}" in _found(_look(site), "storage", Level.WARNING)


def test_a_different_flower_is_a_problem_and_a_different_torch_a_warning(site: Path, tmp_path: Path) -> None:
    older = invite(tmp_path, versions=installed_versions() | {"flwr": "1.30.0", "torch": "2.6.0"})
    assert semisam("site", "approve", older, "--folder", site, "--yes").exit_code == 0
    findings = _look(site)
    assert "1.30.0 at the lead" in _found(findings, "flwr", Level.PROBLEM)
    assert "2.6.0 at the lead" in _found(findings, "torch", Level.WARNING)


def test_weights_with_the_wrong_hash_are_a_problem(site: Path, tmp_path: Path) -> None:
    plan = invite(tmp_path, None, "pseudo_labels={generalists: [medsam], prompting: {planes: [axial]}}")
    assert semisam("site", "approve", plan, "--folder", site, "--yes").exit_code == 0
    assert "skipped" in _found(_look(site), "generalist medsam", Level.WARNING)
    (tmp_path / "weights.pth").write_bytes(b"altered")
    change(site, f"generalists={{medsam: {{weights: {tmp_path / 'weights.pth'}, sha256: {'a' * 64}}}}}")
    assert "SHA-256" in _found(_look(site), "generalist medsam", Level.PROBLEM)


def test_a_patch_too_large_for_memory_is_a_problem(site: Path, tmp_path: Path) -> None:
    huge = invite(tmp_path, None, "data.patch=[512, 512, 512]", "training.labeled_batch=64")
    assert semisam("site", "approve", huge, "--folder", site, "--yes").exit_code == 0
    assert "GiB" in _found(_look(site), "memory", Level.PROBLEM)


@pytest.mark.parametrize(
    "key", ["egress.validation_scores=[dice]", "egress.maximum_update_mb=5", "egress.fingerprint=false"]
)
def test_a_limit_that_was_changed_after_the_approval_is_a_problem(site: Path, key: str) -> None:
    assert _found(_look(site), "manifest", Level.OK)
    change(site, key)
    assert "semisam site approve" in _found(_look(site), "manifest", Level.PROBLEM)


def test_exact_numbers_are_warned_of_at_a_hospital(site: Path) -> None:
    assert "fewer than 5 patients do not leave" in _found(_look(site), "small numbers", Level.OK)
    change(site, "egress.numbers=exact")
    assert "egress.numbers is exact" in _found(_look(site), "small numbers", Level.WARNING)


def test_an_altered_audit_log_is_a_problem(site: Path) -> None:
    assert "is whole, 1 entries" in _found(_look(site), "audit log", Level.OK)
    (site / "storage" / "audit.jsonl").write_text("{}\n")
    assert "semisam site audit verify" in _found(_look(site), "audit log", Level.PROBLEM)


def test_a_nearly_full_disk_is_reported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    assert "storage.folder" in _found(_look(site), "disk", Level.PROBLEM)


def test_an_unreachable_server_is_a_problem(site: Path) -> None:
    findings = _look(site, server=True)
    assert "cannot be reached" in _found(findings, "server", Level.PROBLEM)
    assert "could not be checked" in _found(findings, "registration", Level.WARNING)


def test_a_proxy_in_the_environment_is_reported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.org:3128")
    assert "HTTPS_PROXY" in _found(_look(site), "proxy", Level.WARNING)


@pytest.mark.parametrize(
    ("ahead", "level"), [(0, Level.OK), (60, Level.PROBLEM), (-60, Level.WARNING), (-400, Level.PROBLEM)]
)
def test_clock_drift_is_judged_as_the_server_does(ahead: float, level: Level) -> None:
    import datetime
    import email.utils

    theirs = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ahead)
    assert _check_clock(email.utils.format_datetime(theirs, usegmt=True)).level is level


def test_a_problem_exits_with_1_and_json_is_for_programs(site: Path) -> None:
    change(site, "data.images=/nowhere")
    done = semisam("site", "doctor", "--folder", site, "--no-server", "--json")
    assert done.exit_code == 1
    assert {"level", "subject", "sentence"} == set(json.loads(done.stdout)[0])


def test_a_site_without_problems_exits_with_0(site: Path) -> None:
    done = semisam("site", "doctor", "--folder", site, "--no-server")
    assert done.exit_code == 0, done.output
    assert "0 problem" in done.output
