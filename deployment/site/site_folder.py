"""A hospital's folder for one study: its YAML, the invitation's content, its key, and what is running."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from client.audit_log import AuditLog
from client.site_config import SiteConfig, load_site_config
from deployment.invitation import Invitation
from deployment.site.code_store import CodeStore
from semisam_core.configuration import Name, StrictModel, parse
from semisam_core.errors import ConfigError
from semisam_core.files import utc_stamp, write_atomically, write_json
from semisam_core.plan import Plan, load_plan


class Deployment(StrictModel):
    """What the invitation says besides the plan: deployment.json."""

    study: Name
    site: Name
    address: str
    plan_hash: str
    code_hash: str
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class SiteFolder:
    """Absolute paths within one hospital's folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def at(cls, path: Path) -> SiteFolder:
        """Return the folder of a site that has joined.

        Raises:
            ConfigError: `semisam site init` did not make this folder.
        """
        found = cls(path.expanduser().resolve())
        if not found.deployment_file.is_file():
            raise ConfigError(
                f"{path}: not a site folder. `semisam site init invitation.zip` makes one; --folder names it."
            )
        return found

    @property
    def site_file(self) -> Path:
        """The site's YAML."""
        return self.path / "site.yaml"

    @property
    def plan_file(self) -> Path:
        """The study plan as the lead wrote it."""
        return self.path / "plan.yaml"

    @property
    def ca_file(self) -> Path:
        """The certificate of the study's own authority, which vouches for the server."""
        return self.path / "ca.crt"

    @property
    def deployment_file(self) -> Path:
        """The rest of the invitation."""
        return self.path / "deployment.json"

    @property
    def private_key(self) -> Path:
        """The site's private key, which never leaves this machine."""
        return self.path / "keys" / "site-key"

    @property
    def public_key(self) -> Path:
        """The site's public key, which the lead registers."""
        return self.path / "keys" / "site-key.pub"

    @property
    def running(self) -> Path:
        """Folder of logs, process records and Flower's home."""
        return self.path / "running"

    @property
    def withdrawn_file(self) -> Path:
        """Exists while the site has withdrawn from the study."""
        return self.path / "withdrawn.json"

    def deployment(self) -> Deployment:
        """Return the rest of the invitation.

        Raises:
            ConfigError: the file was altered.
        """
        try:
            content = json.loads(self.deployment_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.deployment_file}: cannot be read ({error}).") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{self.deployment_file}: a mapping is expected.")
        return parse(Deployment, content, str(self.deployment_file))

    def config(self) -> SiteConfig:
        """Return the site's YAML.

        Raises:
            ConfigError: file, key, value and what is accepted.
        """
        return load_site_config(self.site_file)

    def plan(self) -> Plan:
        """Return the study plan.

        Raises:
            ConfigError: file, key, value and what is accepted.
        """
        return load_plan(self.plan_file)

    def code(self, config: SiteConfig) -> CodeStore:
        """Return the store of approved code."""
        return CodeStore(config.storage.folder / "code")

    def adopt(self, invitation: Invitation) -> None:
        """Store the content of an invitation.

        Raises:
            OSError: the folder cannot be written.
        """
        write_atomically(self.plan_file, invitation.plan_text)
        write_atomically(self.ca_file, invitation.ca_certificate)
        content = Deployment(
            study=invitation.study,
            site=invitation.site,
            address=invitation.address,
            plan_hash=invitation.plan.hash,
            code_hash=invitation.code_hash,
            versions=dict(invitation.versions),
        )
        write_json(self.deployment_file, content.model_dump())


def audit_log(config: SiteConfig) -> AuditLog:
    """Return the site's audit log."""
    return AuditLog(config.storage.folder / "audit.jsonl")


def make_storage(config: SiteConfig) -> None:
    """Make the site's storage if it does not exist; only its owner may read it.

    Raises:
        OSError: it cannot be created.
    """
    config.storage.folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def book(config: SiteConfig, kind: str, **entry: str) -> None:
    """Log a decision of this site's staff in its audit log.

    Raises:
        OSError: the log cannot be written.
    """
    make_storage(config)
    audit_log(config).append({"time": utc_stamp(), "site": config.site, "kind": kind, **entry})
