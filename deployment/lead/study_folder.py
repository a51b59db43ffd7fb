"""The study folder: everything the lead keeps about a study, and study.yaml, its settings."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationInfo, field_validator

from deployment.invitation import Invitation, check_address, installed_versions, sha256, write_invitation
from deployment.lead.doors import Bounds
from deployment.lead.pki import CA_CERTIFICATE, check_host, write_certificates
from engines.bundle import build_bundle
from semisam_core.configuration import NAME_ACCEPTED, Name, StrictModel, is_name, parse, read_yaml
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import write_atomically
from semisam_core.plan import Plan, load_plan

FILE = "study.yaml"
VALID_DAYS = 730
LOCAL_ONLY = "127.0.0.1"

TEMPLATE = """\
# A federated study, as its lead sees it. Sites never see this file; they get sites/*.invitation.zip.
version: 1

# Lowercase letters, digits and dashes. Appears in invitations and certificates.
name: {name}

# Host names or IP addresses under which sites reach this server. Invitations name the first, the server's certificate
# all of them. Certificates are made once, by `semisam lead init`: a name added here later is not in them.
hosts: {hosts}

# The address the server listens on, and the one port that sites connect to. 0.0.0.0 means all networks of this
# machine, 127.0.0.1 this machine only.
bind: {bind}
port: {port}

# For submitting, stopping and registering: loopback only, never the network. Flower does not authenticate callers
# there, so anyone who can log in to this machine can use it.
control_port: {control_port}

# How many sites a run waits for.
sites: {sites}

# How long the certificates were made to be valid, in days.
valid_days: {valid_days}

# Bounds on connections to the public port: how many, and for how many seconds each step may take. A site holds a
# handful; raise per_address where more than about 30 sites reach this server from one address (NAT).
# connections: {connections}

# Bounds on what a site may upload: how much larger than the tensors of the plan's specialist its update may be, and how
# many megabytes of this machine's disk must stay free; with less, replies are refused.
# uploads: {uploads}
"""


class LeadError(SemiSAMError):
    """What the lead asked for cannot be done now; the message says why, and what can be done instead."""


class Connections(StrictModel):
    """Bounds on connections to the public port; see `Bounds`."""

    per_address: int = Field(default=Bounds.per_address, ge=8, le=100_000)
    total: int = Field(default=Bounds.total, ge=8, le=100_000)
    handshake_s: float = Field(default=Bounds.handshake_s, ge=1, le=3600)
    headers_s: float = Field(default=Bounds.headers_s, ge=1, le=3600)
    stall_s: float = Field(default=Bounds.stall_s, ge=1, le=3600)
    request_s: float = Field(default=Bounds.request_s, ge=1, le=86_400)


class Uploads(StrictModel):
    """Bounds on what a site may upload; see `update_size.py`."""

    factor: float = Field(default=2.0, ge=1, le=100)
    free_disk_mb: float = Field(default=1000.0, ge=0, le=1e9)


class Settings(StrictModel):
    """The content of study.yaml."""

    version: int = Field(ge=1, le=1)
    name: Name
    hosts: tuple[str, ...] = Field(min_length=1, max_length=32)
    bind: str
    port: int = Field(ge=1, le=65535)
    control_port: int = Field(ge=1, le=65535)
    sites: int = Field(ge=1, le=10_000)
    valid_days: int = Field(ge=1, le=3650)
    connections: Connections = Connections()
    uploads: Uploads = Uploads()

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            check_host(host)
        return value

    @field_validator("bind")
    @classmethod
    def _bind(cls, value: str) -> str:
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ValueError("an IP address of this machine is expected, or 0.0.0.0 for all") from None
        return value

    @field_validator("control_port")
    @classmethod
    def _two_ports(cls, value: int, info: ValidationInfo) -> int:
        if value == info.data.get("port"):
            raise ValueError("port and control_port must differ")
        return value

    @property
    def address(self) -> str:
        """The server's address for sites, as host:port."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def control_address(self) -> str:
        """The server's address for the lead's own commands, as host:port."""
        return f"{LOCAL_ONLY}:{self.control_port}"


@dataclass(frozen=True)
class StudyFolder:
    """A study folder.

    Attributes:
        folder: its absolute path.
        settings: the content of its study.yaml.
    """

    folder: Path
    settings: Settings

    @classmethod
    def load(cls, folder: Path) -> StudyFolder:
        """Read a study folder.

        Raises:
            ConfigError: it is not a study folder, or its study.yaml is invalid.
        """
        path = folder / FILE
        if not path.exists():
            raise ConfigError(f"{folder}: not a study folder (no {FILE}); `semisam lead init` makes one.")
        return cls(folder.resolve(), parse(Settings, read_yaml(path), str(path)))

    @property
    def plan_path(self) -> Path:
        """The study plan."""
        return self.folder / "plan.yaml"

    @property
    def code_path(self) -> Path:
        """The code bundle that sites approve and that runs."""
        return self.folder / "code.fab"

    @property
    def tls(self) -> Path:
        """Certificates and their private keys."""
        return self.folder / "tls"

    @property
    def ca(self) -> Path:
        """The certificate of the study's own certificate authority."""
        return self.tls / CA_CERTIFICATE

    @property
    def keys(self) -> Path:
        """Public keys of admitted sites, <site>.pub."""
        return self.folder / "keys"

    @property
    def invitations(self) -> Path:
        """Invitations for sites, <site>.invitation.zip."""
        return self.folder / "sites"

    @property
    def runs(self) -> Path:
        """One folder per run."""
        return self.folder / "runs"

    @property
    def server(self) -> Path:
        """The SuperLink's own files: database, Flower's home, log."""
        return self.folder / "server"

    @property
    def update_size(self) -> Path:
        """How large an update of the present run may be, for the SuperLink."""
        return self.server / "update-size.json"

    def plan(self) -> Plan:
        """Read the plan.

        Raises:
            ConfigError: it is missing or invalid.
        """
        return load_plan(self.plan_path)

    def code(self) -> bytes:
        """Return the code bundle.

        Raises:
            LeadError: it cannot be read.
        """
        try:
            return self.code_path.read_bytes()
        except OSError as error:
            raise LeadError(
                f"{self.code_path}: cannot be read ({error.strerror}); `semisam lead code --update` makes it."
            ) from None

    def installed_code_differs(self) -> bool:
        """Return whether the installed code differs from the study's bundle."""
        return build_bundle() != self.code()

    def update_code(self) -> None:
        """Make the installed code the study's bundle."""
        write_atomically(self.code_path, build_bundle())

    def invite(self, site: str) -> Path:
        """Write a site's invitation; return its path.

        Raises:
            ConfigError: the plan or the name is invalid.
            InvitationError: a site would reject it.
        """
        check_site_name(site)
        plan, text = self.plan(), self.plan_path.read_bytes()
        invitation = Invitation(
            study=self.settings.name,
            site=site,
            address=self.settings.address,
            plan=plan,
            plan_text=text,
            ca_certificate=self.ca.read_bytes(),
            code=self.code(),
            versions=installed_versions(),
        )
        path = self.invitations / f"{site}.invitation.zip"
        write_invitation(path, invitation)
        return path


@dataclass(frozen=True)
class NewStudy:
    """A study folder to be made.

    Attributes:
        folder: its path; must be empty or missing.
        plan: a plan to copy, or None for the commented template.
        hosts: names or addresses under which sites reach the server; empty for this machine only.
        port: the port that sites connect to.
        sites: how many sites a run waits for.
    """

    folder: Path
    plan: Path | None
    hosts: Sequence[str]
    port: int
    sites: int

    def write(self) -> StudyFolder:
        """Write settings, plan, certificates and code.

        Raises:
            ConfigError: the folder is not empty, or the plan, a host or the port is invalid.
        """
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"{self.folder}: exists and is not empty; a study needs a folder of its own.")
        for host in self.hosts:
            check_host(host)
        text = self._plan_text()
        settings_text = self._settings_text()
        settings = parse(Settings, yaml.safe_load(settings_text), FILE)
        check_address(settings.address)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        study = StudyFolder(self.folder.resolve(), settings)
        write_certificates(study.tls, settings.name, settings.hosts, settings.valid_days)
        for folder in (study.keys, study.invitations, study.runs, study.server):
            folder.mkdir(mode=0o700)
        write_atomically(study.plan_path, text)
        study.update_code()
        write_atomically(self.folder / FILE, settings_text.encode())  # last: a folder without it is not a study
        return study

    def _plan_text(self) -> bytes:
        path = self.plan or template_plan()
        load_plan(path)
        return path.read_bytes()

    def _settings_text(self) -> str:
        values: dict[str, Any] = {
            "name": _study_name(self.folder),
            "hosts": "[" + ", ".join(f'"{host}"' for host in (self.hosts or [LOCAL_ONLY])) + "]",
            "bind": "0.0.0.0" if self.hosts else LOCAL_ONLY,
            "port": self.port,
            "control_port": self.port + 1 if self.port < 65535 else self.port - 1,
            "sites": self.sites,
            "valid_days": VALID_DAYS,
            "connections": _flow(Connections()),
            "uploads": _flow(Uploads()),
        }
        return TEMPLATE.format(**values)


def template_plan() -> Path:
    """Return the commented plan that new studies start from.

    Raises:
        ConfigError: this installation has none.
    """
    path = Path(__file__).resolve().parents[2] / "site_configs" / "left-atrium" / "plan.yaml"
    if not path.is_file():
        raise ConfigError("this installation ships no template plan; give one with --plan.")
    return path


def invitation_differs(study: StudyFolder, invitation: Invitation) -> bool:
    """Return whether an invitation names another plan, code or address than the study has now."""
    now = (study.plan().hash, sha256(study.code()), study.settings.address)
    return (invitation.plan.hash, invitation.code_hash, invitation.address) != now


def check_site_name(site: str) -> None:
    """Check a site's name, which becomes a file name here.

    Raises:
        ConfigError: it is invalid.
    """
    if not is_name(site):
        raise ConfigError(f"{site!r}: a site's name has {NAME_ACCEPTED}.")


def _flow(section: StrictModel) -> str:
    """Return a section of numbers on one line of YAML."""
    return "{" + ", ".join(f"{key}: {value:g}" for key, value in section) + "}"


def _study_name(folder: Path) -> str:
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in folder.resolve().name.lower())
    return name.strip("-")[:63] or "study"
