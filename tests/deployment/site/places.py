"""A site's folder made as a hospital makes it, for tests that need no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from cli.main import app
from deployment.invitation import Invitation, installed_versions, write_invitation
from deployment.lead.pki import write_certificates
from semisam_core.configuration import override
from semisam_core.plan import Plan
from tests.conftest import TINY_PLAN, write_blobs
from tests.deployment.site.bundles import echo_fab

NOBODY = "127.0.0.1:9"


def semisam(*arguments: str | Path, typed: str | None = None) -> Result:
    """Run the `semisam` command inside this process."""
    return CliRunner().invoke(app, [str(part) for part in arguments], input=typed, env={"COLUMNS": "200"})


def invite(place: Path, code: bytes | None = None, *assignments: str, **changes: Any) -> Path:
    """Write an invitation of site alpha to an address where no server listens."""
    text = yaml.safe_dump(override(TINY_PLAN, ["pseudo_labels=null", *assignments])).encode()
    if not (place / "tls").exists():
        write_certificates(place / "tls", "atrium", [], 30)
    content: dict[str, Any] = {
        "study": "atrium",
        "site": "alpha",
        "address": NOBODY,
        "plan": Plan.model_validate_json(json.dumps(yaml.safe_load(text))),
        "plan_text": text,
        "ca_certificate": (place / "tls" / "ca.crt").read_bytes(),
        "code": code or echo_fab(),
        "versions": installed_versions(),
    }
    path = place / f"{len(list(place.glob('*.zip')))}.zip"
    write_invitation(path, Invitation(**(content | changes)))
    return path


def joined(place: Path, cases: int = 3) -> Path:
    """Return the folder of a site that has joined and approved; case-0 is labeled."""
    write_blobs(place / "data", cases)
    invitation = invite(place)
    site = place / "site"
    done = semisam(
        "site",
        "init",
        invitation,
        "--folder",
        site,
        "--images",
        place / "data" / "images",
        "--labels",
        place / "data" / "labels",
    )
    assert done.exit_code == 0, done.output
    change(site, "data.labeled=[case-0]")
    assert semisam("site", "approve", invitation, "--folder", site, "--yes").exit_code == 0
    return site


def change(site: Path, *assignments: str) -> None:
    """Change keys in the site's YAML."""
    path = site / "site.yaml"
    path.write_text(yaml.safe_dump(override(yaml.safe_load(path.read_text()), list(assignments))))
