"""The invitation: one zip with everything a hospital needs to join a study, and no secret.

A hospital gets this file from outside, so reading it trusts nothing in it: names, sizes and hashes are checked, and
anything unexpected is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, field_validator

from semisam_core.configuration import Name, StrictModel, parse, yaml_mapping
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import write_atomically
from semisam_core.plan import Plan

HEADER, PLAN, CA, CODE = "invitation.json", "plan.yaml", "ca.crt", "code.fab"
LIMITS = {HEADER: 2**16, PLAN: 2**17, CA: 2**16, CODE: 10 * 2**20}
MAXIMUM_BYTES = 11 * 2**20
MAXIMUM_DEPTH = 20
MAXIMUM_EVENTS = 10_000  # of the YAML parser; a plan with 64 classes and every key has about 1,500
PACKAGES = ("fedsemisam", "flwr", "torch", "monai")
LOCAL_HEADER_BYTES, END_RECORD_BYTES, END_RECORD, DATA_DESCRIPTOR = 30, 22, b"PK\x05\x06", 0x8
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the same invitation always gives the same file
ADDRESS = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]):[1-9][0-9]{0,4}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!_-]{1,64}$")]


class InvitationError(SemiSAMError):
    """An invitation that cannot be used; the message names the file and what is wrong with it."""


class _Header(StrictModel):
    """The content of invitation.json."""

    format: Literal[1]
    study: Name
    site: Name
    address: str
    plan_hash: Sha256
    code_hash: Sha256
    versions: dict[Literal["fedsemisam", "flwr", "torch", "monai"], Version]

    @field_validator("address")
    @classmethod
    def _reachable(cls, value: str) -> str:
        check_address(value)
        return value

    @field_validator("versions")
    @classmethod
    def _all_named(cls, value: dict[str, str]) -> dict[str, str]:
        if missing := sorted(set(PACKAGES) - set(value)):
            raise ValueError(f"the version of {', '.join(missing)} is missing")
        return value


@dataclass(frozen=True)
class Invitation:
    """The content of an invitation, its parts checked against each other.

    Attributes:
        study: the study's name.
        site: the hospital's name in the study.
        address: host:port of the collaboration's server, the only address a site connects to.
        plan: the study plan.
        plan_text: the plan's file as the lead wrote it, with its comments.
        ca_certificate: PEM certificate that the server's own certificate is signed with.
        code: the Flower app bundle that will run at the site.
        versions: package -> version at the lead.
    """

    study: str
    site: str
    address: str
    plan: Plan
    plan_text: bytes
    ca_certificate: bytes
    code: bytes
    versions: Mapping[str, str]

    @property
    def code_hash(self) -> str:
        """SHA-256 of the code bundle; the site approves code by it."""
        return sha256(self.code)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes in hex."""
    return hashlib.sha256(content).hexdigest()


def check_address(address: str) -> None:
    """Check that an address is host:port, or [IPv6]:port.

    Raises:
        ConfigError: it is not.
    """
    if not ADDRESS.fullmatch(address) or int(address.rpartition(":")[2]) > 65535:
        raise ConfigError(f"{address!r} is not an address; expected host:port, with an IPv6 host in brackets")


def installed_versions() -> dict[str, str]:
    """Return the installed version of each package that an invitation lists."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Write an invitation after checking it the way a hospital will.

    Raises:
        InvitationError: a hospital would refuse it.
        OSError: the file cannot be written.
    """
    header = {
        "format": 1,
        "study": invitation.study,
        "site": invitation.site,
        "address": invitation.address,
        "plan_hash": invitation.plan.hash,
        "code_hash": invitation.code_hash,
        "versions": dict(invitation.versions),
    }
    members = {
        HEADER: (json.dumps(header, indent=2) + "\n").encode(),
        PLAN: invitation.plan_text,
        CA: invitation.ca_certificate,
        CODE: invitation.code,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), content)
    content = buffer.getvalue()
    _parse(content, str(path))
    write_atomically(path, content)


def read_invitation(path: Path) -> Invitation:
    """Read an invitation and check everything that can be checked without its sender.

    Raises:
        InvitationError: the file is missing, too large, not a zip, or not a consistent invitation.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise InvitationError(f"{path}: the invitation cannot be read ({error.strerror}).") from None
    return _parse(content, str(path))


def _parse(content: bytes, origin: str) -> Invitation:
    if len(content) > MAXIMUM_BYTES:
        raise InvitationError(f"{origin}: larger than any invitation ({MAXIMUM_BYTES} bytes).")
    members = _members(content, origin)
    header = _header(members[HEADER], origin)
    plan = _plan(members[PLAN], f"{origin}: {PLAN}")
    if plan.hash != header.plan_hash:
        raise InvitationError(f"{origin}: the hash of {PLAN} is not the one in {HEADER}.")
    if sha256(members[CODE]) != header.code_hash:
        raise InvitationError(f"{origin}: the hash of {CODE} is not the one in {HEADER}.")
    _check_certificate(members[CA], f"{origin}: {CA}")
    return Invitation(
        study=header.study,
        site=header.site,
        address=header.address,
        plan=plan,
        plan_text=members[PLAN],
        ca_certificate=members[CA],
        code=members[CODE],
        versions={package: header.versions[package] for package in PACKAGES},  # type: ignore[index]
    )


def _members(content: bytes, origin: str) -> dict[str, bytes]:
    """Return the four files of the zip; of none is more unpacked than its limit."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = sorted(info.filename for info in infos)
            if names != sorted(LIMITS) or archive.comment:
                raise InvitationError(f"{origin}: expected exactly {', '.join(LIMITS)}, found {names[:8]}.")
            if not _nothing_between(content, infos, archive.start_dir):
                raise InvitationError(
                    f"{origin}: the zip file holds data before, between or after its files, or extra fields. Nothing "
                    "explains it; ask the lead for the file exactly as `semisam lead invite` wrote it."
                )
            return {info.filename: _member(archive, info, origin) for info in infos}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise InvitationError(f"{origin}: this is not a readable zip file ({error}).") from None


def _nothing_between(content: bytes, infos: Sequence[zipfile.ZipInfo], directory: int) -> bool:
    """Return whether the files, then the directory, then its end fill the zip without a gap or an extra field."""
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset != position or info.extra or info.comment or info.flag_bits & DATA_DESCRIPTOR:
            return False
        name_length, extra_length = struct.unpack_from("<HH", content, position + 26)
        if extra_length:
            return False
        position += LOCAL_HEADER_BYTES + name_length + info.compress_size
    end = len(content) - END_RECORD_BYTES
    if position != directory or content[end : end + 4] != END_RECORD:
        return False
    (directory_bytes,) = struct.unpack_from("<I", content, end + 12)
    return bool(directory + directory_bytes == end)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, origin: str) -> bytes:
    limit = LIMITS[info.filename]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 0x1:
        raise InvitationError(f"{origin}: {info.filename} is encrypted or packed in an unusual way.")
    if info.file_size > limit:
        raise InvitationError(f"{origin}: {info.filename} has {info.file_size} bytes, accepted are {limit}.")
    with archive.open(info) as file:
        content = file.read(limit + 1)  # the size in the zip header may be a lie
    if len(content) > limit or len(content) != info.file_size:
        raise InvitationError(f"{origin}: {info.filename} does not have the size that the zip header gives.")
    return content


def _header(content: bytes, origin: str) -> _Header:
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except _TwiceError as error:
        raise InvitationError(f"{origin}: {HEADER}: the key {error} is given twice.") from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InvitationError(f"{origin}: {HEADER} is not a JSON mapping.")
    try:
        return parse(_Header, header, f"{origin}: {HEADER}")
    except ConfigError as error:
        raise InvitationError(str(error)) from None


class _TwiceError(Exception):
    """A key of a JSON mapping is given twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(repr(key))
        found[key] = value
    return found


def _plan(content: bytes, origin: str) -> Plan:
    try:
        text = content.decode("utf-8")
        _check_yaml(text, origin)
        return parse(Plan, yaml_mapping(text, origin), origin)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InvitationError(f"{origin}: this is not valid YAML: {error}") from None
    except ConfigError as error:
        raise InvitationError(str(error)) from None


def _check_yaml(text: str, origin: str) -> None:
    """Refuse what is costly to read: aliases, which can expand without limit, deep nesting, and floods of keys."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > MAXIMUM_EVENTS:
            raise InvitationError(f"{origin}: more YAML than any plan holds ({MAXIMUM_EVENTS} keys, values and marks).")
        if isinstance(event, yaml.AliasEvent):
            raise InvitationError(f"{origin}: YAML aliases (*name) are not accepted in an invitation's plan.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAXIMUM_DEPTH:
            raise InvitationError(f"{origin}: more than {MAXIMUM_DEPTH} levels of YAML; a plan has few.")


def _check_certificate(content: bytes, origin: str) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(content)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        alone = certificate.public_bytes(Encoding.PEM).split() == content.split()
    except (ValueError, x509.ExtensionNotFound) as error:
        raise InvitationError(
            f"{origin}: this is not the PEM certificate of a certificate authority ({error})."
        ) from None
    if not constraints.ca or not alone:
        raise InvitationError(f"{origin}: expected one PEM certificate of a certificate authority and nothing else.")
