"""The study folder: made whole or not at all; invitations match it; its code changes only on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import deployment.lead.study_folder as study_module
from deployment.invitation import read_invitation, sha256
from deployment.lead.status import stale_invitations
from deployment.lead.study_folder import StudyFolder
from engines.bundle import build_bundle
from semisam_core.errors import ConfigError
from semisam_core.plan import load_plan
from tests.deployment.lead.conftest import call, write_key

TEMPLATE = Path(__file__).resolve().parents[3] / "site_configs" / "left-atrium" / "plan.yaml"


def test_a_new_study_has_everything_a_lead_needs(tmp_path: Path, supervised_plan: Path) -> None:
    folder = tmp_path / "Left Atrium"
    code, output = call("init", folder, "--plan", supervised_plan, "--host", "lead.example.org", "--sites", "3")
    assert code == 0, output
    study = StudyFolder.load(folder)
    assert (study.settings.name, study.settings.sites) == ("left-atrium", 3)
    assert study.settings.address == "lead.example.org:8443"
    assert study.settings.control_address == "127.0.0.1:8444"
    assert study.plan_path.read_bytes() == supervised_plan.read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        "study.yaml",
        "plan.yaml",
        "code.fab",
        "tls",
        "keys",
        "sites",
        "runs",
        "server",
    }


def test_a_study_without_a_plan_starts_from_the_commented_template(tmp_path: Path) -> None:
    assert call("init", tmp_path / "atrium")[0] == 0
    assert (tmp_path / "atrium" / "plan.yaml").read_bytes() == TEMPLATE.read_bytes()


def test_a_study_without_a_host_listens_on_this_machine_only(study: StudyFolder) -> None:
    assert study.settings.bind == "127.0.0.1"


def test_a_study_file_without_bounds_on_connections_has_the_defaults_and_may_set_its_own(study: StudyFolder) -> None:
    path = study.folder / "study.yaml"
    assert "connections" not in yaml.safe_load(path.read_text())
    assert study.settings.connections.per_address == 256
    path.write_text(path.read_text() + "connections: {per_address: 1000}\n")
    changed = StudyFolder.load(study.folder).settings.connections
    assert (changed.per_address, changed.headers_s) == (1000, study.settings.connections.headers_s)


def test_every_key_of_study_yaml_is_explained(study: StudyFolder) -> None:
    lines = (study.folder / "study.yaml").read_text().splitlines()
    for key in yaml.safe_load("\n".join(lines)):
        number = next(k for k, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert any(line.startswith("#") for line in lines[max(0, number - 4) : number]), key


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, study: StudyFolder, supervised_plan: Path) -> None:
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    code, output = call("init", study.folder, "--plan", supervised_plan)
    assert code == 2
    assert "not empty" in output
    assert {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "https://lead"), "host name"),
        (("--host", 'a", "b'), "host name"),
        (("--plan", "no.yaml"), "no.yaml"),
    ],
)
def test_an_invalid_call_creates_nothing(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    code, output = call("init", tmp_path / "atrium", *arguments)
    assert code == 2
    assert says in output
    assert not (tmp_path / "atrium").exists()


def test_an_invalid_plan_creates_nothing(tmp_path: Path, supervised_plan: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(supervised_plan.read_text().replace("rounds:", "round:"))
    code, output = call("init", tmp_path / "atrium", "--plan", wrong)
    assert code == 2
    assert "round: unknown key" in output
    assert not (tmp_path / "atrium").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("port", 0, "port"),
        ("control_port", 9443, "must differ"),
        ("bind", "everywhere", "IP address"),
        ("hosts", [], "hosts"),
        ("address", "x", "unknown key"),
    ],
)
def test_an_invalid_study_file_is_refused_by_key(study: StudyFolder, key: str, value: object, says: str) -> None:
    path = study.folder / "study.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"port": 9443, key: value}))
    with pytest.raises(ConfigError, match=says):
        StudyFolder.load(study.folder)


def test_an_invitation_holds_the_studys_plan_code_and_authority(study: StudyFolder) -> None:
    code, output = call("invite", "north", "--study", study.folder, "--json")
    assert code == 0, output
    invitation = read_invitation(study.folder / "sites" / "north.invitation.zip")
    assert invitation.plan == load_plan(study.plan_path)
    assert invitation.plan_text == study.plan_path.read_bytes()
    assert invitation.code == study.code_path.read_bytes()
    assert invitation.ca_certificate == study.ca.read_bytes()
    assert (invitation.study, invitation.site) == ("atrium", "north")
    assert invitation.address == f"127.0.0.1:{study.settings.port}"
    assert json.loads(output)["code_hash"] == invitation.code_hash


def test_an_invitation_holds_no_secret_and_nothing_about_other_sites(study: StudyFolder, tmp_path: Path) -> None:
    call("admit", "secret-site", write_key(tmp_path / "key.pub"), "--study", study.folder)
    call("invite", "secret-site", "--study", study.folder)
    call("invite", "north", "--study", study.folder)
    content = (study.folder / "sites" / "north.invitation.zip").read_bytes()
    assert b"secret-site" not in content
    for path in study.tls.glob("*.key"):
        assert path.read_bytes().splitlines()[1] not in content


@pytest.mark.parametrize("site", ["../north", "North", "north/x", ""])
def test_an_invalid_site_name_is_refused(study: StudyFolder, site: str) -> None:
    code, output = call("invite", site, "--study", study.folder)
    assert code == 2
    assert "site's name" in output
    assert not list(study.invitations.iterdir())


def test_the_same_code_makes_the_same_bundle() -> None:
    assert build_bundle() == build_bundle()


def test_new_code_is_not_used_until_the_lead_says_so(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = study.code()
    call("invite", "north", "--study", study.folder)
    monkeypatch.setattr(study_module, "build_bundle", lambda: b"other code")
    code, output = call("invite", "south", "--study", study.folder)
    assert code == 0
    assert "study's code" in output
    assert study.code() == kept
    code, output = call("code", "--study", study.folder, "--update")
    assert code == 0
    assert sha256(b"other code") in output
    assert "Invite every site again" in output
    assert study.code() == b"other code"
    assert stale_invitations(study) == ["north", "south"]


def test_a_changed_plan_makes_invitations_stale(study: StudyFolder) -> None:
    call("invite", "north", "--study", study.folder)
    assert stale_invitations(study) == []
    study.plan_path.write_text(study.plan_path.read_text().replace("seed: 0", "seed: 1"))
    assert stale_invitations(study) == ["north"]


def test_a_folder_that_is_not_a_study_is_named(tmp_path: Path) -> None:
    for command in (("invite", "north"), ("status",), ("start",), ("stop",), ("run",)):
        code, output = call(*command, "--study", tmp_path)
        assert code == 2
        assert "not a study folder" in output


def test_every_command_explains_itself_with_an_example() -> None:
    for command in ("init", "invite", "admit", "remove", "code", "start", "stop", "run", "status"):
        code, output = call(command, "--help")
        assert code == 0
        assert f"Example: semisam lead {command}" in output, command
