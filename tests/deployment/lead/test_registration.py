"""Admission: which keys are accepted, and what the messages say about the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from deployment.lead.registration import admitted_keys, sync_registrations
from deployment.lead.study_folder import StudyFolder
from engines.flower_control import FlowerControl, FlowerNode
from tests.deployment.lead.conftest import call, write_key


def test_an_ec_key_is_kept_and_registered_when_the_server_starts(study: StudyFolder, tmp_path: Path) -> None:
    key = write_key(tmp_path / "north.pub")
    code, output = call("admit", "north", key, "--study", study.folder, "--json")
    assert code == 0, output
    assert json.loads(output) == {"site": "north", "admitted": True, "registered": False}
    assert (study.keys / "north.pub").read_bytes() == key.read_bytes()
    assert list(admitted_keys(study)) == ["north"]


def test_an_ed25519_key_is_refused_with_the_command_that_makes_an_ec_key(study: StudyFolder, tmp_path: Path) -> None:
    code, output = call("admit", "north", write_key(tmp_path / "key.pub", "ed25519"), "--study", study.folder)
    assert code == 2
    assert "ssh-ed25519" in output
    assert "ssh-keygen -t ecdsa -b 384" in output
    assert not list(study.keys.iterdir())


def test_a_private_key_is_refused_as_such(study: StudyFolder, tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP384R1())
    path = tmp_path / "key"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    code, output = call("admit", "north", path, "--study", study.folder)
    assert code == 2
    assert "must never leave its site" in output


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\x00", b"ecdsa-sha2-nistp384 AAAA", b"ssh-rsa"])
def test_anything_but_a_key_is_refused(study: StudyFolder, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.pub").write_bytes(content)
    code, output = call("admit", "north", tmp_path / "key.pub", "--study", study.folder)
    assert code == 2
    assert "not an OpenSSH public key" in output


def test_a_pem_public_key_is_refused(study: StudyFolder, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    (tmp_path / "key.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert call("admit", "north", tmp_path / "key.pub", "--study", study.folder)[0] == 2


def test_a_key_is_not_replaced_and_not_shared(study: StudyFolder, tmp_path: Path) -> None:
    first, second = write_key(tmp_path / "1.pub"), write_key(tmp_path / "2.pub")
    assert call("admit", "north", first, "--study", study.folder)[0] == 0
    assert call("admit", "north", first, "--study", study.folder)[0] == 0
    code, output = call("admit", "north", second, "--study", study.folder)
    assert code == 2
    assert "lead remove north" in output
    code, output = call("admit", "south", first, "--study", study.folder)
    assert code == 2
    assert "the key of north" in output
    assert (study.keys / "north.pub").read_bytes() == first.read_bytes()


def test_a_removed_site_can_be_admitted_with_another_key(study: StudyFolder, tmp_path: Path) -> None:
    call("admit", "north", write_key(tmp_path / "1.pub"), "--study", study.folder)
    assert call("remove", "north", "--study", study.folder)[0] == 0
    assert call("admit", "north", write_key(tmp_path / "2.pub"), "--study", study.folder)[0] == 0


def test_removing_an_unknown_site_lists_the_admitted_ones(study: StudyFolder) -> None:
    code, output = call("remove", "north", "--study", study.folder)
    assert code == 2
    assert "admitted sites: none" in output


class Registrations:
    """The SuperLink's list of keys."""

    def __init__(self, *nodes: FlowerNode) -> None:
        self._nodes = list(nodes)

    def nodes(self) -> list[FlowerNode]:
        return list(self._nodes)

    def register(self, name: str, public_key: bytes) -> None:
        self._nodes.append(FlowerNode(len(self._nodes) + 100, name, "registered", public_key))

    def unregister(self, node_id: int) -> None:
        self._nodes = [node for node in self._nodes if node.node_id != node_id]


def test_the_superlink_knows_the_admitted_keys_and_no_others(study: StudyFolder, tmp_path: Path) -> None:
    for name in ("north", "south"):
        call("admit", name, write_key(tmp_path / f"{name}.pub"), "--study", study.folder)
    keys = admitted_keys(study)
    kept = FlowerNode(1, "north", "online", keys["north"])
    another_key = FlowerNode(2, "south", "online", b"a key that south had before")
    another_name = FlowerNode(3, "east", "online", keys["south"])
    list_of = Registrations(kept, another_key, another_name)
    sync_registrations(study, cast(FlowerControl, list_of))
    assert {(node.name, node.public_key) for node in list_of.nodes()} == set(keys.items())
    assert kept in list_of.nodes()
