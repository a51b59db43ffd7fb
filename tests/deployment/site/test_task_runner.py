"""Only approved code runs, by its content, and every message is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from client.manifest import Manifest
from deployment.invitation import sha256
from deployment.site import supernode_client as runtime
from deployment.site.bundle import read_bundle
from deployment.site.code_store import CodeStore
from deployment.site.supernode_client import Runtime, UnansweredError
from deployment.site.task_runner import Runner
from semisam_core.files import read_json_lines
from tests.deployment.site.bundles import ECHO, MANIFEST, FakeLink, echo_fab, fake_link, runner_of

SECRET = b"known to two"
GOOD = echo_fab()


@pytest.fixture
def link() -> Iterator[FakeLink]:
    with fake_link(SECRET) as found:
        yield found


@pytest.fixture
def runner(link: FakeLink, tmp_path: Path) -> Iterator[Runner]:
    with runner_of(link, SECRET, tmp_path, GOOD) as found:
        yield found


def _evil(folder: Path) -> bytes:
    return echo_fab(f"open({str(folder / 'evil')!r}, 'w').write('was here')\n" + ECHO)


def test_approved_code_runs_from_the_sites_own_copy(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    asked = link.send(GOOD, "hello")
    assert runner.work()
    said = link.reply(asked).content.config_records["said"]
    assert said["say"] == "hello"
    assert str(said["file"]).startswith(str(tmp_path / "storage" / "code" / sha256(GOOD)))
    assert said["cli"] is False


def test_approved_code_learns_paths_from_the_site_only(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    asked = link.send(GOOD, "hello")
    assert runner.work()
    said = link.reply(asked).content.config_records["said"]
    assert said["site-config"] == str(tmp_path / "site.yaml")
    assert said["manifest"] == MANIFEST.hash
    assert said["run-config"] == 0


def test_unapproved_code_is_refused_unopened_and_recorded(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    evil = _evil(tmp_path)
    asked = link.send(evil, "hello")
    assert runner.work()
    reply = link.reply(asked)
    assert dict(reply.content.config_records["refusal"]) == {"rule": "code-not-approved"}
    assert not (tmp_path / "evil").exists()
    booked = read_json_lines(tmp_path / "storage" / "audit.jsonl")[-1]
    assert (booked["refused"], booked["code"]) == ("code-not-approved", sha256(evil))


def test_a_bundle_that_claims_an_approved_hash_is_refused_by_its_content(
    link: FakeLink, runner: Runner, tmp_path: Path
) -> None:
    asked = link.send(_evil(tmp_path), "hello", claimed=sha256(GOOD))
    assert runner.work()
    assert link.reply(asked).content.config_records["refusal"]["rule"] == "code-not-approved"
    assert not (tmp_path / "evil").exists()


def test_a_task_for_an_agent_is_refused_even_with_approved_code(link: FakeLink, runner: Runner) -> None:
    asked = link.send(GOOD, "hello", kind="flwr-agentapp")
    assert runner.work()
    assert link.reply(asked).content.config_records["refusal"]["rule"] == "code-not-approved"


def test_a_killed_process_becomes_a_refusal_and_the_next_task_works(link: FakeLink, runner: Runner) -> None:
    first = link.send(GOOD, "die")
    assert runner.work()
    assert link.reply(first).content.config_records["refusal"]["rule"] == "process-ended"
    second = link.send(GOOD, "hello")
    assert runner.work()
    assert link.reply(second).content.config_records["said"]["say"] == "hello"


def test_exception_text_of_approved_code_never_leaves(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    asked = link.send(GOOD, "raise")
    assert runner.work()
    reply = link.reply(asked)
    assert "patient" not in repr(reply.content)
    assert reply.content.config_records["refusal"]["rule"] == "process-ended"
    assert "the name of a patient" in (tmp_path / "worker.log").read_text()


def test_an_error_of_approved_code_carries_a_known_reason_or_nothing(link: FakeLink, runner: Runner) -> None:
    told = link.send(GOOD, "error:site-config")
    assert runner.work()
    assert link.reply(told).error.reason == "site-config"
    tells = link.send(GOOD, "error:/data/north/a-patients-name.nii.gz")
    assert runner.work()
    assert link.reply(tells).content.config_records["refusal"]["rule"] == "internal-error"


def test_an_answer_to_another_message_does_not_leave(link: FakeLink, runner: Runner) -> None:
    asked = link.send(GOOD, "astray")
    assert runner.work()
    assert dict(link.reply(asked).content.config_records["refusal"]) == {"rule": "internal-error"}


def test_a_reply_over_the_sites_limit_does_not_leave(link: FakeLink, runner: Runner) -> None:
    asked = link.send(GOOD, "large")
    assert runner.work()
    assert dict(link.reply(asked).content.config_records["refusal"]) == {"rule": "egress"}


@pytest.mark.parametrize(("wish", "rule"), [("pipe", "internal-error"), ("large-head", "egress")])
def test_a_reply_that_approved_code_stored_itself_is_bounded_too(
    link: FakeLink, runner: Runner, wish: str, rule: str
) -> None:
    asked = link.send(GOOD, wish)
    worked = threading.Thread(target=runner.work, daemon=True)
    worked.start()
    worked.join(40)
    assert not worked.is_alive()
    assert dict(link.reply(asked).content.config_records["refusal"]) == {"rule": rule}


def test_revoking_an_approval_ends_work_in_progress(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    asked = link.send(GOOD, "sleep")
    worked = threading.Thread(target=runner.work, daemon=True)
    worked.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("task-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    CodeStore(tmp_path / "storage" / "code").revoke(sha256(GOOD))
    worked.join(20)
    assert not worked.is_alive()
    assert link.reply(asked).content.config_records["refusal"]["rule"] == "code-not-approved"


def test_approving_another_manifest_ends_work_in_progress(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    asked = link.send(GOOD, "sleep")
    worked = threading.Thread(target=runner.work, daemon=True)
    worked.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("task-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    store = CodeStore(tmp_path / "storage" / "code")
    store.approve(read_bundle(GOOD, "test"), Manifest("north", 2, {}))
    worked.join(20)
    assert not worked.is_alive()
    assert link.reply(asked).content.config_records["refusal"]["rule"] == "manifest-not-approved"


def test_a_message_leaves_nothing_on_disk(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    link.send(GOOD, "hello")
    assert runner.work()
    assert not list(tmp_path.glob("task-*"))


def test_a_process_that_takes_too_long_is_ended(link: FakeLink, tmp_path: Path) -> None:
    with runner_of(link, SECRET, tmp_path / "slow", GOOD, seconds=25.0) as runner:
        asked = link.send(GOOD, "sleep")
        assert runner.work()
        assert link.reply(asked).content.config_records["refusal"]["rule"] == "out-of-time"
    assert not [p for p in psutil.Process().children(recursive=True) if "worker.py" in " ".join(p.cmdline())]


def test_a_message_that_stops_arriving_is_not_waited_for(
    link: FakeLink, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "STALLED_S", 0.5)
    link.send(GOOD, "hello", lost=True)
    with pytest.raises(UnansweredError, match="never arrived completely"):
        runner.work()
    asked = link.send(GOOD, "hello")
    assert runner.work()
    assert link.reply(asked).has_content()


def test_a_modified_copy_is_not_used(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    copy = tmp_path / "storage" / "code" / sha256(GOOD) / "files" / "client" / "app.py"
    copy.chmod(0o644)
    copy.write_text(ECHO + "\n# one line more\n")
    asked = link.send(GOOD, "hello")
    assert runner.work()
    assert link.reply(asked).content.config_records["refusal"]["rule"] == "code-altered"


def test_a_file_added_to_the_copy_is_detected(link: FakeLink, runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "storage" / "code" / sha256(GOOD) / "files" / "torch.py").write_text("raise SystemExit")
    asked = link.send(GOOD, "hello")
    assert runner.work()
    assert link.reply(asked).content.config_records["refusal"]["rule"] == "code-altered"


def test_only_a_reason_leaves_if_the_audit_log_cannot_be_written(
    link: FakeLink, runner: Runner, tmp_path: Path
) -> None:
    (tmp_path / "storage" / "audit.jsonl").mkdir()
    asked = link.send(_evil(tmp_path), "hello")
    assert runner.work()
    assert link.reply(asked).error.reason == "audit-log"


def test_code_that_lacks_its_own_package_does_not_get_the_installed_one(link: FakeLink, tmp_path: Path) -> None:
    bundle = echo_fab("import semisam_core\n" + ECHO)
    with runner_of(link, SECRET, tmp_path / "lacking", bundle) as runner:
        asked = link.send(bundle, "hello")
        assert runner.work()
        assert link.reply(asked).content.config_records["refusal"]["rule"] == "process-ended"
    assert "semisam_core is not in the approved bundle" in (tmp_path / "lacking" / "worker.log").read_text()


def test_no_process_without_the_secret_can_take_a_task(link: FakeLink) -> None:
    link.send(GOOD, "hello")
    thief = Runtime(link.address, b"a guess")
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        thief.take()
    thief.close()
