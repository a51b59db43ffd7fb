"""The index of files: hashed once, changes noticed, and never trusted beyond what it can know."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import file_index as module
from client.file_index import SETTLED_NS, FileIndex, Verdict
from client.site import Site
from client.site_config import load_site_config
from semisam_core.data import scans
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from tests.conftest import blob, tiny_plan, write_nifti

MakeSite = Callable[..., Path]
SUPERVISED = ("pseudo_labels=null", "training.steps_per_round=3")
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the names of all files that are opened; also of safetensors, which Python's audit does not see."""
    global _opened
    names: list[str] = []
    original = scans.safe_open
    monkeypatch.setattr(scans, "safe_open", lambda path, **more: names.append(str(path)) or original(path, **more))
    _opened = names
    yield names
    _opened = None


def _scans(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".nii.gz", ".nii"))]


def _prepared(names: list[str]) -> list[str]:
    return [name for name in names if "/prepared/" in name and name.endswith(".safetensors") and "/." not in name]


def _settle() -> None:
    time.sleep(1.5 * SETTLED_NS / 1e9)


def _site(path: Path, plan: Plan, round_number: int, run: str = "run") -> Site:
    return Site(load_site_config(path), plan, run, round_number)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path, opened: list[str]) -> None:
    file, storage = tmp_path / "a.nii", tmp_path / "files.jsonl"
    file.write_bytes(b"one")
    _settle()
    opened.clear()
    assert [FileIndex(storage).sha256(file) for _ in range(3)] == [_digest(b"one")] * 3
    assert _scans(opened) == [str(file)]
    kept = file.stat()
    file.write_bytes(b"two")  # the same size, and the time put back, as rsync does
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert FileIndex(storage).sha256(file) == _digest(b"two")


def test_a_file_that_has_just_changed_is_not_indexed(tmp_path: Path) -> None:
    file, storage = tmp_path / "a.nii", tmp_path / "files.jsonl"
    file.write_bytes(b"one")
    FileIndex(storage, lambda: file.stat().st_mtime_ns + SETTLED_NS).sha256(file)
    assert not storage.exists()
    FileIndex(storage, lambda: file.stat().st_ctime_ns + SETTLED_NS + 1).sha256(file)
    assert storage.exists()


@settings(deadline=None, max_examples=60)
@given(
    garbage=st.one_of(
        st.binary(max_size=80),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["file", "state", "sha256", "scan", "reason"]), inner, max_size=5)
            ),
            max_leaves=8,
        ).map(lambda content: __import__("json").dumps(content).encode()),
    )
)
def test_a_damaged_index_costs_only_time(garbage: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("index")
    file, storage = folder / "a.nii", folder / "files.jsonl"
    file.write_bytes(b"one")
    storage.write_bytes(garbage + b"\n")
    index = FileIndex(storage, lambda: 2**62)
    assert index.sha256(file) == _digest(b"one")
    index.judge("key", Verdict("a reason"))
    again = FileIndex(storage)
    assert again.verdict("key") in (Verdict("a reason"), None)
    assert again.sha256(file) == _digest(b"one")


def test_verdicts_change_and_lines_that_count_no_more_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPARE_LINES", 10)
    storage = tmp_path / "files.jsonl"
    index = FileIndex(storage)
    for k in range(30):
        index.judge("scan", Verdict(None if k % 2 else str(k)))
    assert FileIndex(storage).verdict("scan") == Verdict(None)
    assert len(storage.read_text().splitlines()) == 1


def test_a_round_opens_only_what_it_trains_on(make_site: MakeSite, opened: list[str]) -> None:
    plan = tiny_plan(*SUPERVISED)
    path = make_site(cases=14)
    _settle()
    assert _site(path, plan, 0).join().scalars["unlabeled"] == 12
    opened.clear()
    _site(path, plan, 1).train(dict(new_specialist(plan).state_dict()))
    assert _scans(opened) == []
    steps, batches = plan.training.steps_per_round, plan.training.labeled_batch + plan.training.unlabeled_batch
    assert 1 <= len(set(_prepared(opened))) <= steps * batches < 12


def test_a_file_that_changed_on_disk_is_noticed_at_the_next_message(
    make_site: MakeSite, tmp_path: Path, opened: list[str]
) -> None:
    plan = tiny_plan(*SUPERVISED)
    path, images = make_site(cases=4), tmp_path / "data" / "alpha" / "images"
    _settle()
    assert _site(path, plan, 0).join().scalars["quarantined"] == 0
    (images / "case-1.nii.gz").write_bytes(b"torn")
    write_nifti(images / "case-3.nii.gz", blob(seed=9)[0])
    opened.clear()
    site = _site(path, plan, 1)
    assert site.scans.counts()["quarantined"] == 1
    assert {Path(name).name for name in _scans(opened)} == {"case-1.nii.gz", "case-3.nii.gz"}


def test_a_bad_scan_is_read_again_when_joining_and_not_in_every_round(
    make_site: MakeSite, tmp_path: Path, opened: list[str]
) -> None:
    plan = tiny_plan(*SUPERVISED)
    path = make_site(cases=4)
    (tmp_path / "data" / "alpha" / "images" / "case-1.nii.gz").write_bytes(b"torn")
    _settle()
    reasons = []
    for number, reads in ((0, True), (1, False), (0, True)):
        opened.clear()
        site = _site(path, plan, number)
        if number == 0:
            site.join()
        assert site.scans.counts()["quarantined"] == 1
        reasons += [each.reason for each in site.scans.quarantined]
        assert any("case-1" in name for name in _scans(opened)) == reads
    assert len(set(reasons)) == 1


@pytest.mark.parametrize("change", [{"storage": {"memory_gb": 1e-6}}, {"data": {"labeled": ["case-1"]}}])
def test_a_verdict_does_not_outlive_what_it_depends_on(make_site: MakeSite, change: dict[str, Any]) -> None:
    plan = tiny_plan(*SUPERVISED)
    path = make_site()
    _settle()
    before = _site(path, plan, 0).join().scalars
    site = _site(make_site(**change), plan, 1, "second")
    assert site.scans.counts() != before
    other = _site(path, tiny_plan(*SUPERVISED, "task.classes=[{name: blob, value: 7}]"), 1, "third")
    assert other.scans.counts()["quarantined"] == 2 + ("storage" in change)


def test_a_file_that_changes_while_it_is_read_is_not_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, storage = tmp_path / "a.nii", tmp_path / "files.jsonl"
    file.write_bytes(b"one")
    read = hashlib.file_digest

    def change_meanwhile(*arguments: Any) -> Any:
        done = read(*arguments)
        file.write_bytes(b"another")
        return done

    monkeypatch.setattr(module.hashlib, "file_digest", change_meanwhile)
    FileIndex(storage, lambda: 2**62).sha256(file)
    assert not storage.exists()


def test_a_rewritten_index_keeps_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    monkeypatch.setattr(module, "SPARE_LINES", 0)
    file, storage = tmp_path / "a.nii", tmp_path / "files.jsonl"
    file.write_bytes(b"one")
    index = FileIndex(storage, lambda: 2**62)
    index.sha256(file)
    for k in range(9):
        index.judge("scan", Verdict(str(k)))
    FileIndex(storage)
    assert len(storage.read_text().splitlines()) == 2
    opened.clear()
    assert FileIndex(storage).sha256(file) == _digest(b"one")
    assert _scans(opened) == []


def test_a_line_with_another_hash_than_ours_is_ignored(tmp_path: Path) -> None:
    file, storage = tmp_path / "a.nii", tmp_path / "files.jsonl"
    file.write_bytes(b"one")
    FileIndex(storage, lambda: 2**62).sha256(file)
    line = json.loads(storage.read_text())
    storage.write_text(json.dumps(line | {"sha256": "0" * 40}) + "\n")
    assert FileIndex(storage).sha256(file) == _digest(b"one")
