"""A real server, a real site: approved code is answered, other code is refused unopened, nothing stays running."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deployment.invitation import sha256
from deployment.lead.pki import write_certificates
from engines.processes import MARK
from semisam_core.files import read_json_lines
from tests.conftest import write_blobs
from tests.deployment.site.deployment import Lead, answered, app_folder, bundle_of, eventually, lead, semisam

pytestmark = pytest.mark.slow

EVIL = """\
from pathlib import Path
Path({marker!r}).write_text("imported")
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query()
def answer(message, context):
    Path({marker!r}).write_text("run")
    stolen = Path(str(context.node_config["site-config"])).read_text()
    return Message(RecordDict({{"loot": ConfigRecord({{"file": stolen}})}}), reply_to=message)
"""


@dataclass
class Deployed:
    """A lead, a site that is registered, and the app that the site has approved."""

    lead: Lead
    site: Path
    app: Path
    code: bytes


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "lead").mkdir()
    app = app_folder(folder / "app")
    code = bundle_of(app)
    write_blobs(folder / "data", 3)
    with lead(folder / "lead") as found:
        invitation = found.invite(folder / "alpha.invitation.zip", code)
        site = folder / "site"
        data = folder / "data"
        semisam("site", "init", invitation, "--folder", site, "--images", data / "images", "--labels", data / "labels")
        found.register(site / "keys" / "site-key.pub")
        semisam("site", "approve", invitation, "--folder", site, "--yes")
        try:
            yield Deployed(found, site, app, code)
        finally:
            semisam("site", "stop", "--folder", site)


@pytest.fixture
def started(deployed: Deployed) -> Deployed:
    if "not running" in semisam("site", "status", "--folder", deployed.site):
        semisam("site", "start", "--folder", deployed.site)
    eventually(lambda: json.loads((deployed.site / "running" / "status.json").read_text())["connected"])
    return deployed


def _mark(site: Path) -> str:
    return str(json.loads((site / "running" / "process.json").read_text())["mark"])


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _log(site: Path) -> list[dict[str, object]]:
    return read_json_lines(site / "storage" / "audit.jsonl")


def _doctor(site: Path, expected: int) -> dict[str, str]:
    said = semisam("site", "doctor", "--folder", site, "--no-data", "--json", expected=expected)
    return {finding["subject"]: f"{finding['level']}: {finding['sentence']}" for finding in json.loads(said)}


def test_the_doctor_tells_a_registered_key_from_an_unregistered_one(deployed: Deployed, tmp_path: Path) -> None:
    known = _doctor(deployed.site, 0)
    assert known["registration"].startswith("ok")
    assert known["server"].startswith("ok")
    assert known["clock"].startswith("ok")
    invitation = deployed.lead.invite(tmp_path / "second.zip", deployed.code)
    semisam("site", "init", invitation, "--folder", tmp_path / "second")
    assert "does not accept this site's key" in _doctor(tmp_path / "second", 1)["registration"]


def test_a_server_not_signed_by_the_invitations_certificate_is_reported(deployed: Deployed, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(deployed.site, other)
    write_certificates(tmp_path / "tls", "atrium", [], 30)
    shutil.copy(tmp_path / "tls" / "ca.crt", other / "ca.crt")
    assert "not signed by the invitation's authority" in _doctor(other, 1)["server"]


def test_the_join_message_of_an_approved_bundle_is_answered(started: Deployed, tmp_path: Path) -> None:
    started.lead.submit(started.app, tmp_path / "joined.json")
    said = answered(tmp_path / "joined.json")
    assert said["site"]["site"] == "alpha"
    assert (said["metrics"]["unlabeled"], said["site"]["counts"]) == (1, "buckets")  # 3 of 1 to 4
    assert (_log(started.site)[-1]["kind"], _log(started.site)[-1]["round"]) == ("join", 0)


def test_a_malicious_bundle_is_refused_without_a_file_or_an_import(started: Deployed, tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    evil = app_folder(tmp_path / "evil", EVIL.format(marker=str(marker)))
    started.lead.submit(evil, tmp_path / "evil.json")
    said = answered(tmp_path / "evil.json")
    assert said["refusal"] == {"rule": "code-not-approved"}
    assert set(said) == {"refusal", "site"}
    assert not marker.exists()
    booked = _log(started.site)[-1]
    assert (booked["refused"], booked["code"]) == ("code-not-approved", sha256(bundle_of(evil)))
    assert not list((started.site / "running" / "flwr-home").rglob("*.py"))


def test_a_killed_supernode_is_restarted(started: Deployed) -> None:
    killed = [p for p in _marked(_mark(started.site)) if "supernode.py" in " ".join(p.cmdline())]
    os.kill(killed[0].pid, signal.SIGKILL)

    def anew() -> bool:
        status = json.loads((started.site / "running" / "status.json").read_text())
        return bool(status["supernode_starts"] >= 2 and status["connected"])

    assert eventually(anew)


def test_stop_leaves_no_processes(started: Deployed) -> None:
    mark = _mark(started.site)
    assert len(_marked(mark)) >= 2
    assert "has stopped" in semisam("site", "stop", "--folder", started.site)
    assert not _marked(mark)
    assert "not running" in semisam("site", "status", "--folder", started.site)


def test_a_killed_supervisor_takes_its_processes_with_it(started: Deployed) -> None:
    mark = _mark(started.site)
    pid = json.loads((started.site / "running" / "process.json").read_text())["pid"]
    left = started.site / "running" / "task-of-the-killed"
    left.mkdir()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not _marked(mark), 30)
    semisam("site", "start", "--folder", started.site)
    assert not left.exists()


def test_a_site_that_withdraws_stops_and_does_not_start_again(started: Deployed) -> None:
    semisam("site", "withdraw", "--folder", started.site, "--yes")
    assert "withdrawn" in semisam("site", "status", "--folder", started.site)
    semisam("site", "start", "--folder", started.site, expected=2)
    assert _log(started.site)[-1]["kind"] == "withdraw"
    semisam("site", "withdraw", "--folder", started.site, "--undo")
    semisam("site", "start", "--folder", started.site)
