"""The code that a site has approved, unpacked in its own storage and checked before each use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from client.manifest import Manifest
from deployment.invitation import sha256
from deployment.site.bundle import Bundle, BundleError, read_bundle
from semisam_core.errors import SemiSAMError
from semisam_core.files import utc_stamp, write_atomically, write_json

MANIFEST = "manifest.json"  # beside the code, for people; the hash that counts is in the list


class CodeAlteredError(SemiSAMError):
    """The site's copy of approved code was altered."""


@dataclass(frozen=True)
class Approval:
    """One approval. `revoked` is empty while it is in force; `manifest` is the hash of what may leave under it."""

    hash: str
    component: str
    approved: str
    revoked: str = ""
    manifest: str = ""


class CodeStore:
    """Approved code by hash.

    Args:
        folder: `code` in the site's storage.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._list = folder / "approved.json"

    def approvals(self) -> list[Approval]:
        """Return all approvals ever given, oldest first, revoked ones included.

        Raises:
            CodeAlteredError: the list cannot be read.
        """
        try:
            return [Approval(**entry) for entry in json.loads(self._list.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise CodeAlteredError(f"{self._list}: the list of approved code cannot be read ({error}).") from None

    def approved(self) -> list[Approval]:
        """Return the approvals in force, oldest first.

        Raises:
            CodeAlteredError: the list cannot be read.
        """
        return [entry for entry in self.approvals() if not entry.revoked]

    def approve(self, bundle: Bundle, manifest: Manifest) -> None:
        """Store and unpack a bundle, and add it to the list.

        Args:
            bundle: the code.
            manifest: what may leave while it runs.

        Raises:
            OSError: the storage cannot be written; nothing is approved.
        """
        place = self._folder / bundle.hash
        _remove(place)
        temporary = self._folder / f".{bundle.hash}"
        _remove(temporary)
        for path, content in bundle.files.items():
            target = temporary / "files" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(0o444)
        write_atomically(temporary / "code.fab", bundle.content)
        write_json(temporary / MANIFEST, manifest.as_json())
        os.replace(temporary, place)
        kept = [entry for entry in self.approvals() if entry.hash != bundle.hash or entry.revoked]
        self._write([*kept, Approval(bundle.hash, bundle.component, utc_stamp(), manifest=manifest.hash)])

    def revoke(self, code_hash: str) -> Approval:
        """Revoke an approval and delete its code. The first 8 digits of the hash are enough.

        Raises:
            BundleError: no approval in force has this hash, or several do.
        """
        found = [entry for entry in self.approved() if len(code_hash) >= 8 and entry.hash.startswith(code_hash)]
        if len(found) != 1:
            raise BundleError(f"{code_hash}: {len(found)} approvals have this hash; see `semisam site approve --list`.")
        entries = self.approvals()
        self._write([replace(entry, revoked=utc_stamp()) if entry == found[0] else entry for entry in entries])
        _remove(self._folder / found[0].hash)
        return found[0]

    def last(self) -> Bundle | None:
        """Return the most recently approved bundle that is still approved, or None.

        Raises:
            CodeAlteredError: it was altered.
        """
        approved = self.approved()
        return self._bundle(approved[-1].hash) if approved else None

    def last_manifest(self) -> Any:
        """Return the JSON of the manifest that was approved last with code that is still approved, or None."""
        approved = self.approved()
        try:
            return json.loads(_read(self._folder / approved[-1].hash / MANIFEST)) if approved else None
        except (CodeAlteredError, ValueError):
            return None  # approved before there were manifests

    def verified(self, code_hash: str) -> tuple[Bundle, Path]:
        """Return an approved bundle and the folder of its files, after comparing the two byte by byte.

        Raises:
            CodeAlteredError: a file is missing, extra or altered.
        """
        bundle = self._bundle(code_hash)
        root = self._folder / code_hash / "files"
        found = set()
        for folder, names, files in os.walk(root):
            for entry in (Path(folder) / name for name in (*names, *files)):
                if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                    raise CodeAlteredError(f"{entry}: neither a file nor a folder.")
            found |= {(Path(folder) / name).relative_to(root).as_posix() for name in files}
        if found != set(bundle.files):
            raise CodeAlteredError(f"{root}: its files are not those that were approved.")
        for path, content in bundle.files.items():
            if _read(root / path) != content:
                raise CodeAlteredError(f"{root / path}: differs from the file that was approved.")
        return bundle, root

    def _bundle(self, code_hash: str) -> Bundle:
        path = self._folder / code_hash / "code.fab"
        content = _read(path)
        if sha256(content) != code_hash:
            raise CodeAlteredError(f"{path}: differs from the bundle that was approved.")
        try:
            return read_bundle(content, str(path))
        except BundleError as error:
            raise CodeAlteredError(str(error)) from None

    def _write(self, entries: Sequence[Approval]) -> None:
        write_json(self._list, [asdict(entry) for entry in entries])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CodeAlteredError(f"{path}: cannot be read ({error.strerror}).") from None


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
