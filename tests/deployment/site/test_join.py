"""A hospital gets a folder of its own, whose key never leaves it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client.site_config import load_site_config
from tests.deployment.site.places import invite, semisam


@pytest.fixture
def site(tmp_path: Path) -> Path:
    place = tmp_path / "here"
    done = semisam("site", "init", invite(tmp_path), "--folder", place)
    assert done.exit_code == 0, done.output
    return place


def test_flower_accepts_the_key_pair_and_only_its_owner_can_read_the_private_key(site: Path) -> None:
    private = load_ssh_private_key((site / "keys" / "site-key").read_bytes(), None)
    public = load_ssh_public_key((site / "keys" / "site-key.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public
    assert stat.S_IMODE((site / "keys" / "site-key").stat().st_mode) == 0o600
    assert stat.S_IMODE(site.stat().st_mode) == 0o700


def test_only_the_public_key_is_printed(tmp_path: Path) -> None:
    said = semisam("site", "init", invite(tmp_path), "--folder", tmp_path / "here").output
    assert (tmp_path / "here" / "keys" / "site-key.pub").read_text().split()[1] in said.replace("\n", "")
    assert "PRIVATE" not in said


def test_the_site_file_is_valid_and_carries_the_invited_name(site: Path) -> None:
    config = load_site_config(site / "site.yaml")
    assert config.site == "alpha"
    assert config.storage.folder == site / "storage"
    assert "# " in (site / "site.yaml").read_text()


def test_a_folder_that_is_not_empty_is_left_untouched(site: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    done = semisam("site", "init", invite(tmp_path), "--folder", site)
    assert done.exit_code == 2
    assert "exists already" in done.output
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before


def test_a_tampered_invitation_creates_no_folder(tmp_path: Path) -> None:
    path = invite(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"steps_per_round: 2", b"steps_per_round: 9"))
    assert path.read_bytes() != content
    assert semisam("site", "init", path, "--folder", tmp_path / "here").exit_code == 2
    assert not (tmp_path / "here").exists()
