"""Pseudonyms by keyed hash: a patient always has the same one, and only the key tells whose it is."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from intake.volume import IntakeError
from semisam_core.files import write_atomically

KEY_BYTES = 32
_DIGITS = 12  # 48 bits: two of a million patients share one with a chance of 0.2 %, which is noticed


class Pseudonyms:
    """Names patients and scans.

    Args:
        key: secret of this hospital.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._patients: dict[str, str] = {}

    def patient(self, identity: str) -> str:
        """Return a patient's pseudonym, such as `p3f9a2c1b04de`.

        Raises:
            IntakeError: two patients would share one.
        """
        name = "p" + self.digest("patient", identity)[:_DIGITS]
        if self._patients.setdefault(name, identity) != identity:
            raise IntakeError("two patients would get one pseudonym; import them with another key.")
        return name

    def case(self, patient: str, scan: str) -> str:
        """Return a scan's pseudonym, which begins with its patient's; both are given by their identities."""
        return f"{self.patient(patient)}-{self.digest('scan', patient, scan)[:8]}"

    def digest(self, *parts: str) -> str:
        """Return the keyed hash (HMAC-SHA256, hexadecimal) of a sequence of texts."""
        message = b"".join(len(part.encode()).to_bytes(8) + part.encode() for part in parts)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()


def key_at(path: Path) -> bytes:
    """Return the key in a file; a new one is made, readable by its owner only, if there is no file.

    Raises:
        IntakeError: the file holds no key.
    """
    if not path.exists():
        write_atomically(path, (secrets.token_hex(KEY_BYTES) + "\n").encode(), 0o600)
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (ValueError, UnicodeDecodeError):
        key = b""
    if len(key) != KEY_BYTES:
        raise IntakeError(f"{path}: {2 * KEY_BYTES} hexadecimal digits are expected.")
    return key
