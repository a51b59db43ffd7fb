"""A hospital's ledger of the privacy that its patients have spent, over all studies, runs and reinstallations.

A booking is on disk before the first of its steps is taken, and nothing takes it back. Each line carries a keyed hash
of the one before. Patients are in it by keyed hashes only.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from semisam_core.configuration import Name, StrictModel
from semisam_core.errors import SemiSAMError
from semisam_core.files import utc_stamp, write_atomically, write_json
from semisam_core.privacy.accounting import Spending

LEDGER, SECRET, LOCK, WITNESS = "ledger.jsonl", "secret", "lock", "privacy-witness.json"
LOCK_S = 600.0  # another study's booking takes seconds, its accountant included
MEND = (
    "Nobody knows how much privacy was spent, so no private round is trained. Restore the folder from a backup made "
    "after the last round; to begin a new ledger is to declare that these patients have spent nothing."
)


class LedgerError(SemiSAMError):
    """The ledger is damaged, shortened or missing."""


class _Patients(StrictModel):
    """A set of patients that bookings refer to, by keyed hashes of what identifies them."""

    kind: Literal["patients"] = "patients"
    group: str
    members: tuple[str, ...]


class Booking(StrictModel):
    """Steps that were taken, or may have been.

    Attributes:
        group: the set of patients on whom.
        time: when it was booked, before the first step.
        site: the site's name in the study.
        run: the study's run.
        round: the round.
        plan: the plan's hash.
        noise_multiplier: as in `Spending`.
        sampling_rate: as in `Spending`.
        steps: as in `Spending`.
    """

    kind: Literal["booking"] = "booking"
    group: str
    time: str
    site: Name
    run: Name
    round: int = Field(ge=0)
    plan: str
    noise_multiplier: float = Field(gt=0)
    sampling_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)

    @property
    def spending(self) -> Spending:
        """What it costs."""
        return Spending(self.noise_multiplier, self.sampling_rate, self.steps)


@dataclass(frozen=True)
class Round:
    """The round that a booking is for: site, run, number and the plan's hash."""

    site: str
    run: str
    number: int
    plan: str


@dataclass
class _Content:
    """The ledger as it is on disk: what it says, the chain's last hash, and where its last whole line ends."""

    sets: dict[str, frozenset[str]]
    bookings: list[Booking]
    chain: list[str]
    intact: int


class PrivacyLedger:
    """The ledger in a folder, which outlives studies and installations.

    Bookings of all sets that share a patient count together, also by way of third sets. A patient is recognised by any
    of its identities, such as its pseudonym or the content of one of its files.

    Args:
        folder: the ledger's folder; made on the first booking.
        storage: the site's storage, in which a witness says how far the ledger had come, so that a ledger that was cut,
            replaced by an older one or deleted is noticed.
    """

    def __init__(self, folder: Path, storage: Path) -> None:
        self._folder, self._witness = folder, storage / WITNESS
        self._path = folder / LEDGER

    def bookings(self, identities: Collection[str]) -> list[Booking]:
        """Return what was booked on these patients, in order.

        Raises:
            LedgerError: the ledger cannot be trusted.
            OSError: it cannot be read.
        """
        content, secret = self._read()
        return _overlapping(content, _hashed(identities, secret)) if secret is not None else []

    def groups(self) -> list[list[Booking]]:
        """Return all bookings, those that count together in a list of their own.

        Raises:
            LedgerError: the ledger cannot be trusted.
            OSError: it cannot be read.
        """
        content, _ = self._read()
        found: list[list[Booking]] = []
        for booking in content.bookings:
            if not any(booking in group for group in found):
                found.append(_overlapping(content, content.sets[booking.group]))
        return found

    def book(
        self,
        identities: Collection[str],
        for_round: Round,
        spending: Spending,
        allow: Callable[[Sequence[Spending]], None],
    ) -> None:
        """Book a spending; when this returns, it is on the disk.

        Args:
            identities: everything by which these patients may be recognised.
            for_round: the round that is about to begin.
            spending: its steps.
            allow: gets everything that these patients have spent, this included, and raises to refuse.

        Raises:
            LedgerError: the ledger cannot be trusted.
            OSError: it cannot be written, or another process holds it for too long. Nothing may be trained.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            content, secret = self._read()
            if secret is None:
                secret = self._make_secret()
            members = _hashed(identities, secret)
            allow([*(each.spending for each in _overlapping(content, members)), spending])
            name = hashlib.sha256("\n".join(sorted(members)).encode()).hexdigest()
            booking = Booking(
                group=name,
                time=utc_stamp(),
                site=for_round.site,
                run=for_round.run,
                round=for_round.number,
                plan=for_round.plan,
                noise_multiplier=spending.noise_multiplier,
                sampling_rate=spending.sampling_rate,
                steps=spending.steps,
            )
            known = name in content.sets
            lines: list[StrictModel] = [] if known else [_Patients(group=name, members=tuple(sorted(members)))]
            self._append(content, [*lines, booking], secret)

    def _append(self, content: _Content, lines: Sequence[StrictModel], secret: bytes) -> None:
        text, chain = b"", list(content.chain)
        for line in lines:
            fields = line.model_dump(mode="json")
            chain.append(_mac(secret, chain[-1] if chain else "", fields))
            text += json.dumps(fields | {"mac": chain[-1]}, sort_keys=True).encode() + b"\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, content.intact)  # a kill tore the last line: its steps were never taken
            if os.pwrite(handle, text, content.intact) != len(text):
                raise OSError(f"{self._path}: only part of a booking was written")
            os.fsync(handle)
        finally:
            os.close(handle)
        _flush_folder(self._folder)
        write_json(self._witness, {"lines": len(chain), "mac": chain[-1]})

    def _read(self) -> tuple[_Content, bytes | None]:
        """Return the ledger's content and secret, both empty before the first booking."""
        secret, text = self._secret(), _bytes(self._path)
        if text is None or secret is None:
            if text is not None or self._witness.exists():
                missing = self._path if text is None else self._folder / SECRET
                raise LedgerError(f"{missing}: the privacy ledger, or its secret, is missing. {MEND}")
            return _Content({}, [], [], 0), secret
        content = self._parse(text, secret)
        self._check_witness(content)
        return content, secret

    def _parse(self, text: bytes, secret: bytes) -> _Content:
        content = _Content({}, [], [], 0)
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                fields: Any = json.loads(line)
                mac = fields.pop("mac")
                if not hmac.compare_digest(mac, _mac(secret, content.chain[-1] if content.chain else "", fields)):
                    raise ValueError
                _take(content, fields)
            except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
                raise LedgerError(f"{self._path}: line {number} of the privacy ledger is damaged. {MEND}") from None
            content.chain.append(mac)
        content.intact = len(whole)
        return content

    def _check_witness(self, content: _Content) -> None:
        try:
            seen: Any = json.loads(self._witness.read_text(encoding="utf-8"))
            agrees = content.chain[seen["lines"] - 1] == seen["mac"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, IndexError):
            agrees = False
        if not agrees:
            raise LedgerError(
                f"{self._path}: the privacy ledger is older than {self._witness}, which has seen more of it. {MEND}"
            )

    def _secret(self) -> bytes | None:
        text = _bytes(self._folder / SECRET)
        try:
            return None if text is None else bytes.fromhex(text.decode("ascii"))
        except ValueError:
            raise LedgerError(f"{self._folder / SECRET}: the privacy ledger's secret is damaged. {MEND}") from None

    def _make_secret(self) -> bytes:
        made = secrets.token_bytes(32)
        write_atomically(self._folder / SECRET, made.hex().encode(), mode=0o600)
        return made

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            until = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise TimeoutError(f"{self._folder}: another process has held the ledger too long") from None
                    time.sleep(0.05)
            yield
        finally:
            os.close(handle)  # and with it the lock


def _take(content: _Content, fields: dict[str, Any]) -> None:
    """Take one line, of either kind.

    Raises:
        ValueError: it is of neither, or refers to a set that is not there.
    """
    text = json.dumps(fields)
    if fields["kind"] == "patients":
        patients = _Patients.model_validate_json(text, strict=True)
        content.sets[patients.group] = frozenset(patients.members)
        return
    booking = Booking.model_validate_json(text, strict=True)
    if booking.group not in content.sets:
        raise ValueError("a booking refers to patients who are not there")
    content.bookings.append(booking)


def _overlapping(content: _Content, members: frozenset[str]) -> list[Booking]:
    """Return the bookings on sets that share a patient with these, or with such a set, and so on."""
    reached, waiting = set(members), dict(content.sets)
    counted: set[str] = set()
    while found := [name for name, others in waiting.items() if reached & others]:
        for name in found:
            reached |= waiting.pop(name)
            counted.add(name)
    return [booking for booking in content.bookings if booking.group in counted]


def _hashed(identities: Collection[str], secret: bytes) -> frozenset[str]:
    return frozenset(hmac.new(secret, each.encode(), hashlib.sha256).hexdigest()[:32] for each in identities)


def _mac(secret: bytes, before: str, fields: dict[str, Any]) -> str:
    return hmac.new(secret, f"{before}|{json.dumps(fields, sort_keys=True)}".encode(), hashlib.sha256).hexdigest()


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
