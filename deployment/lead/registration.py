"""Which sites may connect: the public keys in the study folder, which the SuperLink's registrations follow."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from deployment.lead.study_folder import LeadError, StudyFolder, check_site_name
from engines.flower_control import FlowerControl
from semisam_core.files import write_atomically

CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
REMEDY = 'the site makes one with: ssh-keygen -t ecdsa -b 384 -N "" -f site-key, and sends site-key.pub'
MAXIMUM_BYTES = 2**16


def read_public_key(path: Path) -> bytes:
    """Read a site's public key.

    Args:
        path: OpenSSH format, one line.

    Returns:
        The key as PEM, the format that Flower stores.

    Raises:
        LeadError: it is not an EC public key; the message says how to make one.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES)
    except OSError as error:
        raise LeadError(f"{path}: the key cannot be read ({error.strerror}).") from None
    if b"PRIVATE KEY" in content:
        raise LeadError(f"{path}: this is a private key, which must never leave its site; the .pub file is expected.")
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise LeadError(f"{path}: this is not an OpenSSH public key; {REMEDY}.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        kind = content.split(maxsplit=1)[0].decode("ascii", "replace")
        raise LeadError(f"{path}: {kind} keys are not accepted, Flower takes only EC keys; {REMEDY}.")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def admitted_keys(study: StudyFolder) -> dict[str, bytes]:
    """Return site -> public key (PEM) for every admitted site."""
    return {path.stem: read_public_key(path) for path in sorted(study.keys.glob("*.pub"))}


def admit(study: StudyFolder, site: str, path: Path) -> None:
    """Store a site's public key.

    Raises:
        ConfigError: the name is invalid.
        LeadError: the key is invalid, the site already has another key, or the key belongs to another site.
    """
    check_site_name(site)
    key, keys = read_public_key(path), admitted_keys(study)
    if keys.get(site, key) != key:
        raise LeadError(f"{site} is admitted with another key; to replace it, first `semisam lead remove {site}`.")
    if others := [name for name, other in keys.items() if other == key and name != site]:
        raise LeadError(f"{path}: this is the key of {others[0]}; every site needs its own.")
    write_atomically(study.keys / f"{site}.pub", path.read_bytes())


def remove(study: StudyFolder, site: str) -> None:
    """Delete a site's key.

    Raises:
        LeadError: the site is not admitted.
    """
    check_site_name(site)
    try:
        (study.keys / f"{site}.pub").unlink()
    except FileNotFoundError:
        raise LeadError(
            f"{site} is not admitted; admitted sites: {', '.join(admitted_keys(study)) or 'none'}."
        ) from None


def sync_registrations(study: StudyFolder, control: FlowerControl) -> None:
    """Register the study folder's keys with the SuperLink, and unregister all others.

    Raises:
        FlowerError: the SuperLink cannot be reached.
    """
    wanted = set(admitted_keys(study).items())
    for node in control.nodes():
        if (node.name, node.public_key) in wanted:
            wanted.remove((node.name, node.public_key))
        else:
            control.unregister(node.node_id)
    for site, key in sorted(wanted):
        control.register(site, key)
