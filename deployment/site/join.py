"""Joining a study: the site's folder, its key pair, and a site file to fill in."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from deployment.invitation import Invitation
from deployment.site.site_folder import SiteFolder
from deployment.site_template import LEDGER, TEMPLATE
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically
from semisam_core.generalists import generalist_spec

PRIVATE = 0o600


@dataclass(frozen=True)
class Joined:
    """A new site folder.

    Attributes:
        folder: the site's folder.
        public_key: the line to send to the lead.
        lacking: the plan's generalists whose weights are not on this machine.
    """

    folder: SiteFolder
    public_key: str
    lacking: tuple[str, ...]


def join(invitation: Invitation, place: Path, images: Path | None, labels: Path | None) -> Joined:
    """Make a site's folder: key pair, YAML, plan and certificate authority.

    Args:
        invitation: what the lead sent.
        place: the folder to create.
        images: folder of the site's images; by default data/images in the folder.
        labels: folder of the site's labels; by default data/labels in the folder.

    Raises:
        ConfigError: the folder exists and is not empty.
        OSError: it cannot be written.
    """
    place = place.expanduser().resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place}: exists already and was not changed. Give another --folder.")
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = SiteFolder(place.with_name(f".{place.name}.unfinished"))
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(unfinished.path)
    unfinished.path.mkdir(mode=0o700)
    usable, lacking = _generalists(invitation)
    public_key = _write_keys(unfinished, invitation.site)
    unfinished.adopt(invitation)
    write_atomically(unfinished.site_file, _site_yaml(invitation, usable, images, labels).encode())
    os.replace(unfinished.path, place)
    return Joined(SiteFolder(place), public_key, lacking)


def _write_keys(folder: SiteFolder, site: str) -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    folder.private_key.parent.mkdir(mode=0o700)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_atomically(folder.private_key, private, PRIVATE)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + f" {site}"
    write_atomically(folder.public_key, (public + "\n").encode())
    return public


def _generalists(invitation: Invitation) -> tuple[list[str], tuple[str, ...]]:
    """Return the plan's generalists that are here with their weights, and those that need a file or package first."""
    if invitation.plan.pseudo_labels is None:
        return [], ()
    named = invitation.plan.pseudo_labels.generalists
    usable = [name for name in named if generalist_spec(name).packaged and generalist_spec(name).installed]
    return usable, tuple(name for name in named if name not in usable)


def _site_yaml(invitation: Invitation, generalists: list[str], images: Path | None, labels: Path | None) -> str:
    def path(given: Path | None, default: str) -> str:
        return json.dumps(str(given.expanduser().resolve()) if given is not None else default, ensure_ascii=False)

    filled = TEMPLATE.format(
        site=invitation.site,
        images=path(images, "data/images"),
        labels=path(labels, "data/labels"),
        labeled="",
        validation="",
        excluded="",
        split="null",
        generalists="{" + ", ".join(f"{name}: {{weights: packaged}}" for name in generalists) + "}",
        storage="storage",
        numbers="rounded",
        ledger=LEDGER,
    )
    return filled.replace("\nthreads: 1\n", "\n# threads: 8\n")
