"""The audit log: a chain in which every edit, cut and reorder shows, whoever writes to it and however it dies."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.audit_check import check_log, read_entries
from client.audit_log import AuditLog, Head
from semisam_core.errors import ConfigError
from semisam_core.files import append_json_line

SMALL = 400  # bytes; so that a few entries fill several files
ENTRIES = 14


def _log(folder: Path) -> AuditLog:
    return AuditLog(folder / "audit.jsonl", SMALL)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit*.jsonl"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a log in several files, with a repaired line in it."""
    folder = tmp_path_factory.mktemp("written")
    for number in range(ENTRIES):
        _log(folder).append({"kind": "train", "round": number})
        if number == 4:
            with (folder / "audit.jsonl").open("ab") as file:
                file.write(b'{"kind": "tra')
    return folder


def test_a_log_that_nobody_touched_is_whole_over_all_its_files(written: Path) -> None:
    found = check_log(_log(written))
    assert found.problems == []
    assert (found.entries, found.files) == (ENTRIES + 1, len(_files(written)))
    assert found.files >= 4
    rounds = [entry["round"] for entry in read_entries(_log(written)) if entry["kind"] == "train"]
    assert rounds == list(range(ENTRIES))
    assert all(path.stat().st_size < SMALL + 400 for path in _files(written))


@st.composite
def _edits(draw: st.DrawFn) -> tuple[str, float, float, float]:
    kind = draw(
        st.sampled_from(["flip", "cut", "cut-end", "insert", "repeat", "swap", "lose", "blank", "move", "exchange"])
    )
    return kind, *(draw(st.floats(0, 1, exclude_max=True)) for _ in range(3))


def _edit(folder: Path, edit: tuple[str, float, float, float]) -> None:
    """Change a log as somebody might who can write to its files."""
    kind, which, first, second = edit
    files = _files(folder)
    path = files[int(which * len(files))]
    other = files[int(first * len(files))]
    content = path.read_bytes()
    start, end = sorted((int(first * len(content)), int(second * len(content))))
    lines = content.splitlines(keepends=True)
    one, two = int(first * len(lines)), int(second * len(lines))
    if kind == "flip":
        content = content[:start] + bytes([content[start] ^ (1 + int(second * 255))]) + content[start + 1 :]
    elif kind == "cut":
        content = content[:start] + content[end + 1 :]
    elif kind == "cut-end":
        content = content[:start] if second < 0.5 else b"".join(lines[:one])
    elif kind == "insert":
        content = content[:start] + bytes([int(second * 256)]) + content[start:]
    elif kind == "repeat":
        content = b"".join([*lines[:two], lines[one], *lines[two:]])
    elif kind == "swap":
        lines[one], lines[two] = lines[two], lines[one]
        content = b"".join(lines)
    elif kind == "blank":
        content = b"".join([*lines[:one], b"\n", *lines[one:]])
    elif kind == "move":
        moved = lines.pop(one)
        path.write_bytes(b"".join(lines))
        path, content = other, other.read_bytes() + moved
    elif kind == "exchange":
        there = other.read_bytes()
        other.write_bytes(content)
        content = there
    path.write_bytes(content)
    if kind == "lose":
        path.unlink()


def _content(folder: Path) -> bytes:
    """Return all lines; where one file ends and the next begins says nothing."""
    return b"".join(path.read_bytes() for path in _files(folder))


@settings(deadline=None, max_examples=100)
@given(edit=_edits())
def test_every_edit_cut_and_reorder_is_found_and_stays_found(
    written: Path, tmp_path_factory: pytest.TempPathFactory, edit: tuple[str, float, float, float]
) -> None:
    folder = tmp_path_factory.mktemp("edited") / "log"
    shutil.copytree(written, folder)
    _edit(folder, edit)
    changed = _content(folder) != _content(written)
    assert check_log(_log(folder)).problems or not changed
    _log(folder).append({"kind": "train", "round": ENTRIES})
    found = check_log(_log(folder))
    assert not changed or found.problems or found.notes != check_log(_log(written)).notes
    assert list(read_entries(_log(folder)))[-1]["round"] == ENTRIES
    shutil.rmtree(folder)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_lines_cut_from_the_end_are_missed_although_the_rest_is_a_chain(
    written: Path, tmp_path: Path, cut: int
) -> None:
    folder = shutil.copytree(written, tmp_path / "log")
    while cut:
        path = _files(folder)[-1]
        lines = path.read_bytes().splitlines(keepends=True)
        kept, cut = lines[: max(0, len(lines) - cut)], max(0, cut - len(lines))
        path.write_bytes(b"".join(kept)) if kept else path.unlink()
    assert any("were written" in each for each in check_log(_log(folder)).problems)
    _log(folder).append({"kind": "train", "round": ENTRIES})
    assert "log-broken" in [entry["kind"] for entry in read_entries(_log(folder))]
    assert any("does not end as it did" in each or "missing" in each for each in check_log(_log(folder)).problems)


@pytest.mark.parametrize("change", ["cut", "edit"])
def test_a_last_line_that_was_changed_is_put_on_record_by_the_next_writer(tmp_path: Path, change: str) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append({"round": 1})
    first = log.path.read_bytes()
    log.append({"round": 2})
    log.path.write_bytes(first if change == "cut" else log.path.read_bytes().replace(b'"round": 2', b'"round": 7'))
    log.append({"kind": "train", "round": 3})
    assert [entry.get("kind") for entry in read_entries(log)][-2:] == ["log-broken", "train"]


@pytest.mark.parametrize("change", ["count", "last", "size", "files", "signature", "no json", "gone", "secret"])
def test_the_record_of_the_end_cannot_be_forged_without_the_secret(written: Path, tmp_path: Path, change: str) -> None:
    folder = shutil.copytree(written, tmp_path / "log")
    head = folder / "audit-head.json"
    content = json.loads(head.read_text())
    if change == "secret":
        (folder / "audit-secret").write_text("ab" * 32)
    elif change == "gone":
        head.unlink()
    elif change == "no json":
        head.write_text("{")
    else:
        content[change] = content[change][::-1] if isinstance(content[change], str) else content[change] + 1
        head.write_text(json.dumps(content))
    assert any("audit-head.json" in each for each in check_log(_log(folder)).problems)
    _log(folder).append({"kind": "train", "round": 99})
    assert any("audit-head.json" in each for each in check_log(_log(folder)).problems)  # now on record in the chain


def test_a_whole_log_put_back_is_found_by_a_seal_that_was_noted_elsewhere(tmp_path: Path) -> None:
    for number in range(3):
        _log(tmp_path / "log").append({"round": number})
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    _log(tmp_path / "log").append({"round": 3})
    _log(tmp_path / "copy").append({"round": 7})
    seal = check_log(_log(tmp_path / "log")).seal
    assert seal.startswith("4:")
    _log(tmp_path / "log").append({"round": 4})
    assert check_log(_log(tmp_path / "log"), seal).problems == []
    assert check_log(_log(tmp_path / "copy")).problems == []  # as it was once
    assert any(seal in each for each in check_log(_log(tmp_path / "copy"), seal).problems)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        check_log(_log(tmp_path / "log"), "4:abc")


@pytest.mark.parametrize("torn", [b"", b'{"kind": "trai'])
def test_a_log_from_before_the_chain_is_kept_and_the_chain_says_where_it_begins(tmp_path: Path, torn: bytes) -> None:
    for number in range(2):
        append_json_line(tmp_path / "audit.jsonl", {"round": number})
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(torn)
    before = (tmp_path / "audit.jsonl").read_bytes()
    _log(tmp_path).append({"round": 2})
    assert (tmp_path / "audit.jsonl").read_bytes().startswith(before)
    found = check_log(_log(tmp_path))
    assert (found.problems, found.entries) == ([], 2)
    assert "the chain begins here" in found.notes[0]
    (tmp_path / "audit.jsonl").write_bytes(
        (tmp_path / "audit.jsonl").read_bytes().replace(b'"round": 1', b'"round": 7')
    )
    assert check_log(_log(tmp_path)).problems


def test_a_log_without_any_entry_is_whole(tmp_path: Path) -> None:
    assert check_log(_log(tmp_path)).problems == []


def test_what_a_killed_writer_left_is_on_record_and_the_log_is_whole_again(tmp_path: Path) -> None:
    _log(tmp_path).append({"round": 1})
    head = (tmp_path / "audit-head.json").read_bytes()
    _log(tmp_path).append({"round": 2})
    (tmp_path / "audit-head.json").write_bytes(head)  # killed before it could confirm
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"round"')
    assert any("not confirmed" in each for each in check_log(_log(tmp_path)).problems)
    _log(tmp_path).append({"round": 3})
    found = check_log(_log(tmp_path))
    assert found.problems == []
    (note,) = found.notes
    assert "1 lines before this one and 8 bytes were never confirmed" in note


@pytest.mark.parametrize("torn", [b"", b'{"kind": "trai'])
@pytest.mark.parametrize("old", [b"", b'{"round": 0}\n', b'{"round": 0}'])
def test_a_kill_at_any_step_of_the_first_entries_leaves_a_whole_log(tmp_path: Path, old: bytes, torn: bytes) -> None:
    """Every state that a kill can leave on disk while a log is begun, and while what a kill left is put on record."""
    states = []

    class Killed(AuditLog):
        def _save(self, head: Head, secret: bytes) -> None:
            states.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
            super()._save(head, secret)
            states.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})

    log = Killed(tmp_path / "audit.jsonl")
    if old:
        (tmp_path / "audit.jsonl").write_bytes(old)
    log.append({"round": 1})
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(torn)
    log.append({"round": 2})
    assert len(states) >= 6
    for number, state in enumerate(states):
        for junk in (b"", b'{"again'):
            folder = tmp_path / f"{number}{len(junk)}"
            folder.mkdir()
            for name, content in state.items():
                (folder / name).write_bytes(content)
            with (folder / "audit.jsonl").open("ab") as file:
                file.write(junk)
            _log(folder).append({"round": 3})
            found = check_log(_log(folder))
            assert found.problems == [], (number, junk)
            assert bool(found.notes) or not (junk or old)
            shutil.rmtree(folder)


def test_a_kill_between_renaming_a_full_file_and_saying_so_is_no_fault(tmp_path: Path) -> None:
    log = _log(tmp_path)
    while (tmp_path / "audit.jsonl").exists() is False or (tmp_path / "audit.jsonl").stat().st_size < SMALL:
        log.append({"round": 1})
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit-000001.jsonl")
    assert check_log(log).problems == []
    log.append({"round": 2})
    found = check_log(log)
    assert (found.problems, found.notes, found.files) == ([], [], 2)


def test_a_file_in_the_way_of_a_full_one_is_not_overwritten(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 1)
    log.append({"round": 1})
    (tmp_path / "audit-000001.jsonl").write_text("mine")
    with pytest.raises(OSError, match="in the way"):
        log.append({"round": 2})
    assert (tmp_path / "audit-000001.jsonl").read_text() == "mine"


def _append_many(folder: Path, writer: int, count: int) -> None:
    for number in range(count):
        _log(folder).append({"writer": writer, "round": number})


def test_writers_at_once_make_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, k, 15)) for k in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    found = check_log(_log(tmp_path))
    assert (found.problems, found.notes, found.entries) == ([], [], 60)
    for writer in range(4):
        rounds = [entry["round"] for entry in read_entries(_log(tmp_path)) if entry["writer"] == writer]
        assert rounds == list(range(15))


def _append_for_ever(folder: Path, told: Connection) -> None:
    number = 0
    while True:
        _log(folder).append({"kind": "train", "round": number})
        told.send(number)
        number += 1


def test_a_log_whose_writers_are_killed_is_whole_and_has_every_confirmed_entry(tmp_path: Path) -> None:
    confirmed = []
    for life in range(12):
        hears, says = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_append_for_ever, args=(tmp_path, says))
        process.start()
        says.close()
        assert hears.poll(30)
        time.sleep(0.003 * life)
        process.kill()
        process.join(10)
        number = 0
        with contextlib.suppress(EOFError):
            while True:
                number = hears.recv()
        confirmed.append(number)
    _log(tmp_path).append({"kind": "end"})
    found = check_log(_log(tmp_path))
    assert found.problems == []
    rounds = [entry["round"] for entry in read_entries(_log(tmp_path)) if entry["kind"] == "train"]
    first = [place for place, number in enumerate(rounds) if number == 0]
    lives = [rounds[start:end] for start, end in zip(first, [*first[1:], None], strict=True)]
    assert [life == list(range(len(life))) for life in lives] == [True] * 12
    assert all(life[-1] in (last, last + 1) for life, last in zip(lives, confirmed, strict=True))


def test_a_writer_that_hangs_is_waited_for_with_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.audit_log.LOCK_S", 0.1)
    with _log(tmp_path).locked(), pytest.raises(OSError, match="another process has held"):
        _log(tmp_path).append({"round": 1})


def test_an_entry_that_could_not_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log(tmp_path).append({"round": 1})
    before = (tmp_path / "audit.jsonl").read_bytes()
    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        return write(descriptor, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="only part"):
        _log(tmp_path).append({"round": 2})
    monkeypatch.undo()
    assert (tmp_path / "audit.jsonl").read_bytes() == before
    assert check_log(_log(tmp_path)).problems == []


def test_only_the_owner_may_read_secret_and_head(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0))
        _log(tmp_path).append({"round": 1})
    for name in ("audit-secret", "audit-head.json", "audit.jsonl"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name
