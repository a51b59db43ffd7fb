"""The privacy ledger: what is booked stays booked, whoever is killed, and a damaged ledger stops private rounds."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.privacy_ledger import LEDGER, LOCK, SECRET, WITNESS, LedgerError, PrivacyLedger, Round
from semisam_core.privacy.accounting import Spending

ROOT = Path(__file__).resolve().parents[2]
ROUND = Round("alpha", "run", 1, "0" * 64)
STEP = Spending(1.0, 0.1, 3)


def _nothing(spent: Sequence[Spending]) -> None:
    """Allow everything."""


def _ledger(folder: Path, storage: str = "storage") -> PrivacyLedger:
    return PrivacyLedger(folder / "ledger", folder / storage)


def _book(ledger: PrivacyLedger, who: Collection[str], spending: Spending = STEP) -> list[Spending]:
    """Book a spending and return what the ledger said had then been spent."""
    said: list[Spending] = []
    ledger.book(who, ROUND, spending, said.extend)
    return said


def test_before_the_first_booking_nothing_is_spent(tmp_path: Path) -> None:
    assert _ledger(tmp_path).bookings({"a"}) == []
    assert _ledger(tmp_path).groups() == []
    assert not (tmp_path / "ledger").exists()


def test_a_booking_is_there_for_every_later_process(tmp_path: Path) -> None:
    _book(_ledger(tmp_path), {"a", "b"})
    (booking,) = _ledger(tmp_path).bookings({"a"})
    assert booking.spending == STEP
    assert (booking.site, booking.run, booking.round, booking.plan) == ("alpha", "run", 1, "0" * 64)


def test_whoever_allows_sees_everything_that_these_patients_spent_with_the_new_booking(tmp_path: Path) -> None:
    ledger, more = _ledger(tmp_path), Spending(2.0, 0.2, 1)
    assert _book(ledger, {"a"}) == [STEP]
    assert _book(ledger, {"a"}, more) == [STEP, more]


def test_what_is_not_allowed_is_not_booked(tmp_path: Path) -> None:
    def never(spent: Sequence[Spending]) -> None:
        raise RuntimeError("too much")

    ledger = _ledger(tmp_path)
    _book(ledger, {"a"})
    before = (tmp_path / "ledger" / LEDGER).read_bytes()
    with pytest.raises(RuntimeError, match="too much"):
        ledger.book({"a"}, ROUND, STEP, never)
    assert (tmp_path / "ledger" / LEDGER).read_bytes() == before


def test_studies_on_other_patients_do_not_count_and_a_single_common_patient_makes_them_count(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    _book(ledger, {"a", "b"})
    assert _book(ledger, {"c", "d"}) == [STEP]
    assert _book(ledger, {"b", "e"}) == [STEP] * 2
    assert [len(group) for group in ledger.groups()] == [2, 1]


def test_a_patient_recognised_by_different_things_in_different_studies_is_one(tmp_path: Path) -> None:
    """The pseudonym changes after the first study, the file after the second: third and first share nothing."""
    ledger = _ledger(tmp_path)
    _book(ledger, {"patient|old", "file|one"})
    _book(ledger, {"patient|new", "file|one"})
    assert _book(ledger, {"patient|new", "file|two"}) == [STEP] * 3


def test_another_installation_with_the_same_ledger_goes_on_with_it(tmp_path: Path) -> None:
    _book(_ledger(tmp_path, "first-installation"), {"a"})
    shutil.rmtree(tmp_path / "first-installation")
    assert _book(_ledger(tmp_path, "second-installation"), {"a"}) == [STEP] * 2
    assert _book(_ledger(tmp_path, "second-installation"), {"a"}) == [STEP] * 3


def test_no_identity_is_in_it(tmp_path: Path) -> None:
    _book(_ledger(tmp_path), {"patient|jane-doe-19640203"})
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"jane" not in everything
    assert (tmp_path / "ledger" / SECRET).stat().st_mode & 0o077 == 0
    assert (tmp_path / "ledger").stat().st_mode & 0o077 == 0


def test_patients_are_listed_once_however_many_rounds_they_take_part_in(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    for _ in range(5):
        _book(ledger, {str(k) for k in range(100)})
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "ledger" / LEDGER).read_text().splitlines()]
    assert kinds == ["patients"] + ["booking"] * 5


def test_a_line_torn_by_a_kill_is_no_booking_and_the_next_one_is_kept_apart_from_it(tmp_path: Path) -> None:
    _book(_ledger(tmp_path), {"a"})
    path = tmp_path / "ledger" / LEDGER
    path.write_bytes(path.read_bytes() + b'{"kind": "booking", "steps": 99999999999999999')
    assert _ledger(tmp_path).bookings({"a"}) == _ledger(tmp_path).groups()[0]
    assert _book(_ledger(tmp_path), {"a"}) == [STEP] * 2
    assert len(_ledger(tmp_path).bookings({"a"})) == 2


@pytest.fixture(scope="module")
def written() -> list[bytes]:
    """Return the lines of a ledger with three sets and five bookings, and at the end its secret and witness."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for who in ({"a", "b"}, {"c"}, {"a", "b"}, {"b", "d"}, {"c"}):
            _book(_ledger(folder), who)
        lines = (folder / "ledger" / LEDGER).read_bytes().splitlines(keepends=True)
        return [*lines, (folder / "ledger" / SECRET).read_bytes(), (folder / "storage" / WITNESS).read_bytes()]


def _restored(folder: Path, text: bytes, written: list[bytes], witness: bool = True) -> PrivacyLedger:
    (folder / "ledger").mkdir()
    (folder / "ledger" / LEDGER).write_bytes(text)
    (folder / "ledger" / SECRET).write_bytes(written[-2])
    if witness:
        (folder / "storage").mkdir()
        (folder / "storage" / WITNESS).write_bytes(written[-1])
    return _ledger(folder)


def _refused(ledger: PrivacyLedger) -> bool:
    try:
        ledger.bookings({"a"})
    except LedgerError:
        with pytest.raises(LedgerError, match="no private round is trained"):
            _book(ledger, {"a"})
        return True
    return False


def test_an_untouched_ledger_is_read(written: list[bytes], tmp_path: Path) -> None:
    assert len(_restored(tmp_path, b"".join(written[:-2]), written).bookings({"d"})) == 3


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_changed_byte_is_found(written: list[bytes], data: st.DataObject) -> None:
    text = bytearray(b"".join(written[:-2]))
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] = data.draw(st.integers(0, 255).filter(lambda value: value != text[place]))
    with tempfile.TemporaryDirectory() as folder:
        assert _refused(_restored(Path(folder), bytes(text), written))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_line_taken_out_moved_or_repeated_is_found(written: list[bytes], data: st.DataObject) -> None:
    lines = written[:-2]
    any_order = st.permutations(range(len(lines))) | st.lists(st.integers(0, len(lines) - 1), max_size=len(lines) + 1)
    chosen = data.draw(any_order.filter(lambda each: list(each) != list(range(len(each)))))
    with tempfile.TemporaryDirectory() as folder:
        # Without the witness: the chain itself knows of everything but a cut at the end.
        assert _refused(_restored(Path(folder), b"".join(lines[k] for k in chosen), written, witness=False))


@pytest.mark.parametrize("kept", range(8))
def test_a_cut_at_the_end_is_found_by_the_witness(written: list[bytes], kept: int, tmp_path: Path) -> None:
    assert len(written[:-2]) == 8
    assert _refused(_restored(tmp_path, b"".join(written[:kept]), written))


def test_without_the_witness_a_ledger_that_was_cut_passes_for_an_older_one(
    written: list[bytes], tmp_path: Path
) -> None:
    """As after a reinstallation; the documentation says so."""
    assert not _refused(_restored(tmp_path, b"".join(written[:-3]), written, witness=False))


@pytest.mark.parametrize("lost", [LEDGER, SECRET])
def test_a_ledger_that_is_gone_does_not_begin_anew(lost: str, tmp_path: Path) -> None:
    _book(_ledger(tmp_path), {"a"})
    (tmp_path / "ledger" / lost).unlink()
    with pytest.raises(LedgerError, match="is missing"):
        _ledger(tmp_path).bookings({"a"})
    with pytest.raises(LedgerError, match="is missing"):
        _book(_ledger(tmp_path), {"a"})


@pytest.mark.parametrize("content", [b"", b"not hexadecimal", b"00" * 32])
def test_a_damaged_secret_stops_private_rounds(content: bytes, tmp_path: Path) -> None:
    _book(_ledger(tmp_path), {"a"})
    (tmp_path / "ledger" / SECRET).write_bytes(content)
    assert _refused(_ledger(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"lines": 99, "mac": "x"}', '{"lines": 0, "mac": "x"}'])
def test_a_damaged_witness_stops_private_rounds(content: str, tmp_path: Path) -> None:
    _book(_ledger(tmp_path), {"a"})
    (tmp_path / "storage" / WITNESS).write_text(content)
    assert _refused(_ledger(tmp_path))


def test_a_disk_that_cannot_be_written_books_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _book(_ledger(tmp_path), {"a"})

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("client.privacy_ledger.os.pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            _book(_ledger(tmp_path), {"a"})
    assert len(_ledger(tmp_path).bookings({"a"})) == 1


def test_a_booking_is_flushed_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("client.privacy_ledger.os.fsync", flushed.append)
    _book(_ledger(tmp_path), {"a"})
    assert len(flushed) >= 4  # secret, ledger, its folder, witness


def test_a_booking_waits_for_another_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _book(_ledger(tmp_path), {"a"})
    monkeypatch.setattr("client.privacy_ledger.LOCK_S", 0.2)
    with (tmp_path / "ledger" / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process has held the ledger too long"):
            _book(_ledger(tmp_path), {"a"})
        assert len(_ledger(tmp_path).bookings({"a"})) == 1
    assert _book(_ledger(tmp_path), {"a"}) == [STEP] * 2


def test_two_studies_at_once_lose_no_booking(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.client import test_privacy_ledger as t\n"
        "ledger = t._ledger(Path(sys.argv[1]), sys.argv[2])\n"
        "for _ in range(20): t._book(ledger, {'a', sys.argv[2]})\n"
    )
    studies = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), storage], cwd=ROOT) for storage in ("one", "two")
    ]
    assert [each.wait(timeout=120) for each in studies] == [0, 0]
    assert len(_ledger(tmp_path, "three").bookings({"a"})) == 40


@pytest.mark.parametrize("seed", range(3))
def test_after_a_kill_at_any_moment_no_less_is_booked_than_was_spent(seed: int, tmp_path: Path) -> None:
    assert killed_at_random(tmp_path, kills=4, chance=random.Random(seed)) >= 0


def _book_and_spend(folder: Path) -> None:
    """Book rounds of seven steps without end, and note each step as it is taken."""
    steps = os.open(folder / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(1, 100_000):
        _ledger(folder).book({"a"}, Round("alpha", "run", number, "0" * 64), Spending(1.0, 0.1, 7), _nothing)
        for _ in range(7):
            os.write(steps, b".")


def killed_at_random(folder: Path, kills: int, chance: random.Random) -> int:
    """Kill a process that books and spends, `kills` times at random moments; return how much more was booked at last.

    Raises:
        AssertionError: less was booked than spent, or the ledger has become shorter or unreadable.
    """
    before = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                _book_and_spend(folder)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "the process ended by itself"
        booked = sum(each.steps for each in _ledger(folder).bookings({"a"}))
        steps = folder / "steps"
        spent = steps.stat().st_size if steps.exists() else 0
        assert booked >= spent, f"{booked} steps are booked, {spent} were taken"
        assert booked >= before
        before = booked
    return before - (steps.stat().st_size if steps.exists() else 0)
