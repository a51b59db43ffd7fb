"""`semisam site audit`: what a hospital and its data-protection officer see of the log."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from client.audit_log import AuditLog
from client.egress import EgressGate
from client.manifest import Manifest, MessageItems, ScalarItem
from client.site_config import Egress
from deployment.site.site_folder import SiteFolder, audit_log, book
from semisam_core.contract import RefusalRule, TensorSpec, weights_sha256
from tests.deployment.site.places import joined, semisam

SECRET_PATH = "/data/Mueller_Hans"
WEIGHTS = {"a": torch.ones(2, 3)}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site that has approved code, answered once with tensors and once without, and refused once."""
    folder = joined(tmp_path)
    log = audit_log(SiteFolder.at(folder).config())
    gate = EgressGate("alpha", Egress(), log.path)
    items = MessageItems(1, {"steps": ScalarItem(0, 9, True)}, {}, {"a": TensorSpec((2, 3), torch.float32)})
    gate.agree(Manifest("alpha", 1, {"train": items}))
    gate.reply("train", "run", 1, "p" * 64, {"steps": 2}, WEIGHTS)
    gate.refuse("train", "run", 2, RefusalRule.STORAGE, f"no space at {SECRET_PATH}")
    return folder


def _seal(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("Seal: ")).removeprefix("Seal: ")


def test_a_whole_log_is_said_to_be_whole_and_its_seal_holds(site: Path) -> None:
    first = semisam("site", "audit", "verify", "--folder", site)
    assert (first.exit_code, "The log is whole. 3 entries in 1 files." in first.output) == (0, True)
    book(SiteFolder.at(site).config(), "withdraw")
    later = semisam("site", "audit", "verify", "--folder", site, "--seal", _seal(first.output))
    assert (later.exit_code, "4 entries" in later.output) == (0, True)


def test_an_edited_log_is_a_fault_with_its_line(site: Path) -> None:
    path = site / "storage" / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps": 2', b'"steps": 3'))
    said = semisam("site", "audit", "verify", "--folder", site)
    assert said.exit_code == 1
    assert "Problem: audit.jsonl, line 3" in said.output


def test_a_seal_that_is_none_is_refused(site: Path) -> None:
    said = semisam("site", "audit", "verify", "--folder", site, "--seal", "nonsense")
    assert (said.exit_code, "64 hexadecimal digits" in said.output) == (2, True)


def test_the_export_says_what_left_by_hash_and_bytes_and_nothing_that_stays(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    done = semisam("site", "audit", "export", "--folder", site, "--out", out)
    assert done.exit_code == 0, done.output
    exported = json.loads((out / "audit.json").read_text())
    assert [each["kind"] for each in exported["entries"]] == ["approve", "train", "train"]
    assert exported["check"]["problems"] == []
    assert exported["check"]["seal"] == _seal(done.output)
    with (out / "audit.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[1]["bytes"], rows[1]["sha256"], rows[1]["scalars"]) == ("24", weights_sha256(WEIGHTS), "steps=2")
    assert rows[2]["refused"] == "storage"
    summary = (out / "summary.txt").read_text()
    assert "The log is whole. 3 entries" in summary
    assert "1 replies with 24 bytes of tensors, and 1 refusals" in summary
    assert weights_sha256(WEIGHTS) in summary
    assert "steps 2" in summary
    assert "approve code" in summary
    for path in out.iterdir():
        assert SECRET_PATH not in path.read_text(), path


def test_the_export_of_an_altered_log_says_so(site: Path, tmp_path: Path) -> None:
    path = site / "storage" / "audit.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    done = semisam("site", "audit", "export", "--folder", site, "--out", tmp_path / "export")
    assert done.exit_code == 1
    assert "The log is not as it was written." in (tmp_path / "export" / "summary.txt").read_text()


def test_a_folder_with_files_is_not_exported_over(site: Path) -> None:
    done = semisam("site", "audit", "export", "--folder", site, "--out", site)
    assert (done.exit_code, "exists already" in done.output) == (2, True)


def test_no_cell_of_the_table_is_a_formula(site: Path, tmp_path: Path) -> None:
    AuditLog(site / "storage" / "audit.jsonl").append({"kind": "train", "run": "=cmd|'/c calc'!A0", "refused": "x"})
    assert semisam("site", "audit", "export", "--folder", site, "--out", tmp_path / "export").exit_code == 0
    with (tmp_path / "export" / "audit.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[-1]["run"].startswith("'=")


def test_status_counts_what_left_over_all_files_of_the_log(site: Path) -> None:
    log = AuditLog(site / "storage" / "audit.jsonl", rotate_bytes=1)
    log.append({"kind": "train", "round": 2, "bytes": 26, "scalars": {}})
    status = json.loads(semisam("site", "status", "--folder", site, "--json").stdout)
    assert (status["answered"], status["updates_bytes"]) == ({"train": 2}, 50)
