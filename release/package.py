"""What an exported package holds: names of its files, its manifest, and the signature over it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import AfterValidator, Field, ValidationError

from intake.guards import Limits, check_file
from intake.volume import IntakeError
from release.model import ModelError
from semisam_core.configuration import StrictModel
from semisam_core.files import write_atomically

MANIFEST, SIGNATURE, SIGNER = "MANIFEST.json", "MANIFEST.sig", "signer.pem"
UNLISTED = (MANIFEST, SIGNATURE, SIGNER)
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
MANIFEST_LIMITS = Limits(file_bytes=1_000_000)


def _relative(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or str(path) != value or "\\" in value or not value.isprintable():
        raise ValueError("a plain path within the package is expected")
    return value


class FileRecord(StrictModel):
    """Hash and size of one file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class PackageManifest(StrictModel):
    """Every file of a package but the manifest itself, its signature and the signer's key."""

    version: Literal[1] = 1
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    plan_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
    files: dict[Annotated[str, AfterValidator(_relative)], FileRecord]


@dataclass(frozen=True)
class Signed:
    """Who signed a package.

    Attributes:
        fingerprint: SHA-256 of the public key, in hexadecimal; None for an unsigned package.
    """

    fingerprint: str | None


def new_key(path: Path) -> str:
    """Write a new Ed25519 key, readable by its owner only, and return the fingerprint of its public half.

    Raises:
        ModelError: there is a file already.
    """
    if path.exists():
        raise ModelError(f"{path}: there is a file already; a key is never overwritten.")
    key = Ed25519PrivateKey.generate()
    write_atomically(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    return fingerprint(key.public_key())


def read_key(path: Path) -> Ed25519PrivateKey:
    """Return a private key.

    Raises:
        ModelError: the file holds none.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: no private key can be read there ({type(error).__name__}).") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ModelError(f"{path}: an Ed25519 key is expected; --new-key makes one.")
    return key


def expected_signer(text: str) -> str:
    """Return the fingerprint that is meant: the text itself, or that of the public key in the file that it names.

    Raises:
        ModelError: it is neither.
    """
    plain = text.strip().lower()
    if FINGERPRINT.fullmatch(plain):
        return plain
    try:
        key = load_pem_public_key(Path(text).read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ModelError(
            f"{text}: it is neither a fingerprint (64 hexadecimal digits) nor a file with an Ed25519 public key."
        )
    return fingerprint(key)


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def seal(folder: Path, weights_sha256: str, plan_hash: str, key: Ed25519PrivateKey | None) -> PackageManifest:
    """List every file of a package with its hash, and sign the list."""
    files = {str(path.relative_to(folder).as_posix()): _recorded(path) for path in _files(folder)}
    manifest = PackageManifest(weights_sha256=weights_sha256, plan_hash=plan_hash, files=files)
    content = _canonical(manifest)
    write_atomically(folder / MANIFEST, content)
    if key is not None:
        write_atomically(folder / SIGNATURE, key.sign(content).hex().encode())
        write_atomically(folder / SIGNER, _pem(key.public_key()))
    return manifest


def check(folder: Path) -> tuple[PackageManifest, Signed]:
    """Check a package's files against its manifest, and its signature. Nothing of it is loaded.

    Raises:
        ModelError: a file is missing, altered, a link or not listed, or the signature does not fit; every such file is
            named.
    """
    if not (folder / MANIFEST).is_file():
        raise ModelError(f"{folder}: no exported package is here ({MANIFEST} is missing).")
    if links := [name for name in UNLISTED if (folder / name).is_symlink()]:
        raise ModelError(f"{folder}: {', '.join(links)} is a link. Do not use this package.")
    manifest, content = _read_manifest(folder / MANIFEST)
    faults = []
    for name, expected in manifest.files.items():
        file = folder / name
        if any(part.is_symlink() for part in (file, *file.parents) if part.is_relative_to(folder) and part != folder):
            faults.append(f"{name} is a link")
        elif not file.is_file():
            faults.append(f"{name} is missing")
        elif _recorded(file) != expected:
            faults.append(f"{name} was altered")
    found = {str(each.relative_to(folder).as_posix()) for each in _files(folder)}
    faults += [f"{name!a} is not listed" for name in sorted(found - set(manifest.files))]
    if faults:
        raise ModelError(f"{folder}: {'; '.join(faults)}. Do not use this package.")
    return manifest, _signed(folder, content)


def _read_manifest(path: Path) -> tuple[PackageManifest, bytes]:
    """Return the manifest and the bytes that were read, which are those that the signature must fit."""
    try:
        check_file(path, MANIFEST_LIMITS)
        content = path.read_bytes()
        manifest = PackageManifest.model_validate_json(content)
    except (IntakeError, OSError, ValidationError):
        raise ModelError(f"{path}: the manifest is damaged.") from None
    if content != _canonical(manifest):  # so that one manifest has one form, and every changed byte is found
        raise ModelError(f"{path}: the manifest is damaged: it is not as it was written.")
    return manifest, content


def _canonical(manifest: PackageManifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _signed(folder: Path, content: bytes) -> Signed:
    signature, signer = folder / SIGNATURE, folder / SIGNER
    if not signature.exists() and not signer.exists():
        return Signed(None)
    try:
        pem, signed = signer.read_bytes(), signature.read_text(encoding="ascii")
        key = load_pem_public_key(pem)
        if not isinstance(key, Ed25519PublicKey) or pem != _pem(key) or signed != bytes.fromhex(signed).hex():
            raise ValueError
        key.verify(bytes.fromhex(signed), content)
    except (OSError, ValueError, UnsupportedAlgorithm, InvalidSignature):
        raise ModelError(f"{folder}: the signature does not fit the manifest. Do not use this package.") from None
    return Signed(fingerprint(key))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and str(path.relative_to(folder)) not in UNLISTED:
            yield path


def _recorded(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)
