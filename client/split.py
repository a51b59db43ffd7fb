"""A site's split by patient: made by a rule or by lists, and held fast for the length of a run."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semisam_core.data.cases import Inventory, Role
from semisam_core.data.patients import MANIFEST
from semisam_core.errors import SemiSAMError
from semisam_core.files import write_atomically, write_json

logger = logging.getLogger(__name__)

RECORD, SECRET = "split.json", "split-secret"


class SplitChangedError(SemiSAMError):
    """A case has another role than when the run began, so that scores might be of scans that were trained on."""


@dataclass(frozen=True)
class RunSplit:
    """The split that a run began with.

    Attributes:
        roles: case -> role.
        sha256: the split's hash, which may leave: keyed by a secret of the site, it tells nothing but a change.
    """

    roles: Mapping[str, Role]
    sha256: str


def run_split(run_folder: Path, storage: Path, found: Inventory, patients: Mapping[str, str]) -> RunSplit:
    """Return the run's split: the one in the run's folder, or on the run's first message the one of now, kept there.

    Args:
        run_folder: the run's folder at this site.
        storage: the site's storage, which holds its secret.
        found: the site's cases as they are now.
        patients: case -> patient; a case that is not there is its own patient.

    Raises:
        SplitChangedError: a case has another role now.
        OSError: the record or the secret cannot be written.
    """
    path = run_folder / RECORD
    kept = _read(path)
    now = {case.id: case.role for case in found.cases}
    if kept is None:
        kept = RunSplit(now, _hash(now, patients, _secret(storage)))
        write_json(path, {"roles": kept.roles, "sha256": kept.sha256})
    changed = [case for case in sorted(now) if kept.roles.get(case, now[case]) is not now[case]]
    if changed:
        moves = ", ".join(f"{case} (was {kept.roles[case]}, is {now[case]})" for case in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise SplitChangedError(
            f"the split changed during the run {run_folder.name}: {moves}{more}. A case that moves between training "
            "and validation would be scored by a specialist that has seen it. Put data.labeled, data.validation, "
            f"data.split, the label files and {MANIFEST} back as they were when the run began, or have the study's "
            "lead start a new run, which begins with the split of then."
        )
    added = sorted(set(now) - set(kept.roles))
    if added:
        logger.warning(
            "%d cases were added during the run %s and wait for the next one: %s%s.",
            len(added),
            run_folder.name,
            ", ".join(added[:5]),
            ", ..." if len(added) > 5 else "",
        )
    return kept


def _hash(roles: Mapping[str, Role], patients: Mapping[str, str], secret: bytes) -> str:
    """Return the keyed hash of the sorted list of (patient, case, role)."""
    rows = sorted([patients.get(case, case), case, role.value] for case, role in roles.items())
    return hmac.new(secret, json.dumps(rows).encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> RunSplit | None:
    """Return the kept split; None if there is none yet.

    Raises:
        SplitChangedError: there is a record, but it cannot be understood.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return RunSplit({str(case): Role(role) for case, role in content["roles"].items()}, str(content["sha256"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SplitChangedError(
            f"{path} is damaged, so nobody knows which split the run began with. Restore it from a backup, or have the "
            "study's lead start a new run."
        ) from None


def _secret(storage: Path) -> bytes:
    """Return the site's secret of 32 bytes, made on first use; only the storage's owner may read it."""
    path = storage / SECRET
    try:
        return bytes.fromhex(path.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        made = secrets.token_bytes(32)
        write_atomically(path, made.hex().encode(), mode=0o600)
        os.chmod(path, 0o600)
        return made
