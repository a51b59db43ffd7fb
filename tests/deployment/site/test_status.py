"""What a site says of itself, and how it leaves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deployment.site import lifecycle as control
from deployment.site.lifecycle import running
from deployment.site.site_folder import SiteFolder
from deployment.site.supervisor import ConnectionLog
from engines.processes import birth
from semisam_core.files import append_json_line, read_json_lines, write_json
from tests.deployment.site.places import joined, semisam


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return joined(tmp_path)


def _status(site: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(semisam("site", "status", "--folder", site, "--json").stdout)
    return found


def test_egress_is_counted_from_the_audit_log(site: Path) -> None:
    log = site / "storage" / "audit.jsonl"
    for number in (1, 2):
        append_json_line(log, {"kind": "train", "round": number, "bytes": 500, "scalars": {"steps": 2}})
    append_json_line(log, {"kind": "train", "round": 3, "refused": "out-of-time"})
    status = _status(site)
    assert status["answered"] == {"train": 2}
    assert status["updates_bytes"] == 1000
    assert status["refused"] == {"out-of-time": 1}


def test_a_torn_or_foreign_line_of_the_log_does_not_hide_the_rest(site: Path) -> None:
    with (site / "storage" / "audit.jsonl").open("a") as log:
        log.write('["a list"]\n{"kind": "tra')
    assert semisam("site", "status", "--folder", site).exit_code == 0


def test_a_process_that_merely_reuses_the_pid_is_not_the_site(site: Path) -> None:
    write_json(site / "running" / "process.json", {"pid": os.getpid(), "birth": "earlier", "mark": "x"})
    assert running(SiteFolder.at(site)) is None
    assert "was not running" in semisam("site", "stop", "--folder", site).output


@pytest.fixture
def supervisor(site: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process recorded as the site's supervisor, as the supervisor records itself."""
    process = subprocess.Popen(["sleep", "60"])
    noted = {"pid": process.pid, "birth": birth(psutil.Process(process.pid)), "mark": "none has this"}
    write_json(site / "running" / "process.json", noted)
    yield process
    process.kill()
    process.wait(10)


def test_a_site_is_found_and_stopped_after_the_clock_changed(
    site: Path, supervisor: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: boot + 3600.0)
    assert "has stopped" in semisam("site", "stop", "--folder", site).output
    supervisor.wait(10)  # raises if it lives


@pytest.mark.parametrize("broken", ["site.yaml", "storage/audit.jsonl"])
def test_a_site_stops_and_withdraws_even_if_one_of_its_files_is_broken(
    site: Path, supervisor: subprocess.Popen[bytes], broken: str
) -> None:
    (site / broken).unlink()
    (site / broken).mkdir()
    assert semisam("site", "withdraw", "--folder", site, "--yes").exit_code == 2
    supervisor.wait(10)  # raises if it lives
    assert (site / "withdrawn.json").exists()


def test_a_site_that_cannot_be_marked_withdrawn_is_stopped_anyway(
    site: Path, supervisor: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(control, "write_json", full)
    said = semisam("site", "withdraw", "--folder", site, "--yes")
    assert (said.exit_code, "No space left" in said.output) == (2, True)
    supervisor.wait(10)  # raises if it lives


def test_a_withdrawn_site_says_so_until_it_is_undone(site: Path) -> None:
    said = semisam("site", "withdraw", "--folder", site, "--yes").output
    assert "cannot be" in said
    assert "audit.jsonl" in said
    assert _status(site)["withdrawn"] is True
    refused = semisam("site", "start", "--folder", site)
    assert (refused.exit_code, "withdrawn" in refused.output) == (2, True)
    assert semisam("site", "withdraw", "--folder", site, "--undo").exit_code == 0
    assert _status(site)["withdrawn"] is False
    kinds = [entry["kind"] for entry in read_json_lines(site / "storage" / "audit.jsonl")]
    assert kinds == ["approve", "withdraw", "withdraw-undone"]


def test_withdrawing_asks_for_confirmation(site: Path) -> None:
    assert semisam("site", "withdraw", "--folder", site, typed="n\n").exit_code == 1
    assert _status(site)["withdrawn"] is False


def test_a_folder_where_no_site_has_joined_is_explained(tmp_path: Path) -> None:
    done = semisam("site", "status", "--folder", tmp_path)
    assert done.exit_code == 2
    assert "semisam site init" in done.output


def test_a_truncated_or_removed_log_stops_nothing(tmp_path: Path) -> None:
    log = tmp_path / "supernode.log"
    look = ConnectionLog(log)
    log.write_text("WARNING : Connection attempt failed, retrying in 2.00 seconds\n")
    assert not look.look()
    log.unlink()
    assert not look.look()
    log.write_text("INFO : SuperNode ID: 12\n")
    assert look.look()


def test_the_connection_state_is_the_last_one_flower_logged(tmp_path: Path) -> None:
    log = tmp_path / "supernode.log"
    log.write_text("INFO : SuperNode ID: 12\n")
    look = ConnectionLog(log)
    assert not look.look()
    with log.open("a") as file:
        file.write("INFO : SuperNode ID: 12\n")
    assert look.look()
    with log.open("a") as file:
        file.write("WARNING : Connection attempt failed, retrying in 2.00 seconds\nINFO : Connection succ")
    assert not look.look()
    with log.open("a") as file:
        file.write("essful after 3.00 seconds and 2 tries.\n")
    assert look.look()
    with log.open("a") as file:
        file.write("WARNING : Connection attempt failed, retrying in 2.00 seconds\nINFO :      Received successfully\n")
    assert look.look()
