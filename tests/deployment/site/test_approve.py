"""A person sees the code that would run and approves or declines it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployment.invitation import sha256
from semisam_core.files import read_json_lines
from tests.deployment.site.bundles import ECHO, echo_fab
from tests.deployment.site.places import invite, joined, semisam


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return joined(tmp_path)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_an_approval_is_recorded_with_the_hash_of_the_code(site: Path) -> None:
    booked = read_json_lines(site / "storage" / "audit.jsonl")[-1]
    assert (booked["kind"], booked["code"]) == ("approve", sha256(echo_fab()))


def test_the_diff_to_the_last_approved_code_is_shown(site: Path, tmp_path: Path) -> None:
    offered = _write(tmp_path / "new.fab", echo_fab(ECHO + "import socket\n", **{"client/more.py": "x = 1\n"}))
    said = semisam("site", "approve", offered, "--folder", site, "--diff", typed="n\n")
    assert "client/app.py" in said.output
    assert "+import socket" in said.output
    assert "client/more.py" in said.output
    assert said.exit_code == 1


def test_declined_code_is_not_stored(site: Path, tmp_path: Path) -> None:
    offered = _write(tmp_path / "new.fab", echo_fab(ECHO + "import socket\n"))
    assert "Nothing was approved" in semisam("site", "approve", offered, "--folder", site, typed="n\n").output
    assert sha256(offered.read_bytes()) not in semisam("site", "approve", "--folder", site, "--list").output


def test_changes_of_the_plan_are_shown_and_recorded(site: Path, tmp_path: Path) -> None:
    said = semisam("site", "approve", invite(tmp_path, None, "training.rounds=7"), "--folder", site, "--yes")
    assert "training.rounds: 2 -> 7" in said.output
    assert "rounds: 7" in (site / "plan.yaml").read_text()


def test_the_approval_covers_what_may_leave(site: Path, tmp_path: Path) -> None:
    listed = json.loads(semisam("site", "manifest", "--folder", site, "--json").stdout)
    (approval,) = json.loads((site / "storage" / "code" / "approved.json").read_text())
    booked = read_json_lines(site / "storage" / "audit.jsonl")[-1]
    assert approval["manifest"] == booked["manifest"] == listed["hash"]
    said = semisam(
        "site", "approve", invite(tmp_path, None, "evaluation.every_rounds=2"), "--folder", site, typed="n\n"
    )
    assert "messages.evaluate.times: 2 -> 1" in said.output


def test_a_plan_that_lets_nothing_else_leave_keeps_the_manifest(site: Path, tmp_path: Path) -> None:
    said = semisam("site", "approve", invite(tmp_path, None, "seed=7"), "--folder", site, typed="n\n")
    assert "seed: 0 -> 7" in said.output
    assert "What may leave is unchanged." in said.output


def test_an_invitation_for_another_site_is_refused(site: Path, tmp_path: Path) -> None:
    said = semisam("site", "approve", invite(tmp_path, site="beta"), "--folder", site, "--yes")
    assert said.exit_code == 2
    assert "site beta" in said.output


def test_a_revoked_approval_no_longer_holds_and_stays_on_record(site: Path) -> None:
    code = sha256(echo_fab())
    assert semisam("site", "approve", "--folder", site, "--revoke", code[:12]).exit_code == 0
    assert "revoked" in semisam("site", "approve", "--folder", site, "--list").output
    assert read_json_lines(site / "storage" / "audit.jsonl")[-1]["kind"] == "revoke"
    assert not (site / "storage" / "code" / code).exists()
    started = semisam("site", "start", "--folder", site)
    assert started.exit_code == 2
    assert "no code is approved" in started.output


def test_an_unknown_hash_cannot_be_revoked(site: Path) -> None:
    assert semisam("site", "approve", "--folder", site, "--revoke", "0" * 64).exit_code == 2


def test_code_with_paths_outside_its_folder_is_never_written(site: Path, tmp_path: Path) -> None:
    offered = _write(tmp_path / "new.fab", echo_fab(**{"../../../evil.py": "x"}))
    assert semisam("site", "approve", offered, "--folder", site, "--yes").exit_code == 2
    assert not list(tmp_path.rglob("evil.py"))
