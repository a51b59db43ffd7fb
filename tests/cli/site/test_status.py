"""What a site says of itself, and how it leaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cli.site.control import running
from cli.site.folder import SiteFolder
from cli.site.supervisor import ConnectionLog
from semisam_core.files import append_json_line, read_json_lines, write_json
from tests.cli.site.places import joined, semisam


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return joined(tmp_path)


def _status(site: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(semisam("site", "status", "--folder", site, "--json").stdout)
    return found


def test_what_left_is_counted_from_the_audit_log(site: Path) -> None:
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


def test_a_process_that_only_has_the_same_number_is_not_the_site(site: Path) -> None:
    write_json(site / "running" / "process.json", {"pid": os.getpid(), "created": time.time() - 1e6, "mark": "x"})
    assert running(SiteFolder.at(site)) is None
    assert "was not running" in semisam("site", "stop", "--folder", site).output


def test_a_site_that_withdrew_says_so_until_it_is_undone(site: Path) -> None:
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


def test_withdrawing_needs_a_yes(site: Path) -> None:
    assert semisam("site", "withdraw", "--folder", site, typed="n\n").exit_code == 1
    assert _status(site)["withdrawn"] is False


def test_a_folder_that_no_site_joined_in_is_a_sentence(tmp_path: Path) -> None:
    done = semisam("site", "status", "--folder", tmp_path)
    assert done.exit_code == 2
    assert "semisam site init" in done.output


def test_the_connection_is_what_flower_said_last(tmp_path: Path) -> None:
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
