"""The invitation: what is written is what is read, and nothing else is ever accepted."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deployment.invitation import (
    LIMITS,
    Invitation,
    InvitationError,
    _parse,
    _plan,
    installed_versions,
    read_invitation,
    sha256,
    write_invitation,
)
from deployment.lead.pki import write_certificates
from semisam_core.plan import Plan
from tests.conftest import TINY_PLAN, tiny_plan

Change = Callable[[dict[str, bytes]], None]
SUPERVISED = {key: value for key, value in TINY_PLAN.items() if key != "pseudo_labels"}
PLAN_TEXT = b"# agreed in spring\n" + yaml.safe_dump(SUPERVISED).encode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    write_certificates(folder, "atrium", [], 30)
    return folder


@pytest.fixture(scope="module")
def invitation(certificates: Path) -> Invitation:
    return Invitation(
        study="atrium",
        site="north",
        address="lead.example.org:8443",
        plan=_supervised(),
        plan_text=PLAN_TEXT,
        ca_certificate=(certificates / "ca.crt").read_bytes(),
        code=b"a bundle of code",
        versions=installed_versions(),
    )


@pytest.fixture(scope="module")
def bundle(invitation: Invitation, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bundle") / "north.invitation.zip"
    write_invitation(path, invitation)
    return path.read_bytes()


def _supervised() -> Plan:
    return tiny_plan("pseudo_labels=null")


def _members(bundle: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _refusal(folder: Path, content: bytes) -> str:
    path = folder / "invitation.zip"
    path.write_bytes(content)
    with pytest.raises(InvitationError) as refused:
        read_invitation(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


def _packed(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _with_header(**changes: object) -> Change:
    def change(members: dict[str, bytes]) -> None:
        header = json.loads(members["invitation.json"])
        members["invitation.json"] = json.dumps(header | changes).encode()

    return change


def _with(name: str, content: bytes) -> Change:
    return lambda members: members.update({name: content})


def test_an_invitation_is_read_as_it_was_written(tmp_path: Path, invitation: Invitation) -> None:
    path = tmp_path / "north.invitation.zip"
    write_invitation(path, invitation)
    assert read_invitation(path) == invitation
    assert invitation.code_hash == sha256(b"a bundle of code")


def test_an_invitation_holds_four_files_and_no_key(bundle: bytes) -> None:
    members = _members(bundle)
    assert sorted(members) == ["ca.crt", "code.fab", "invitation.json", "plan.yaml"]
    assert b"PRIVATE KEY" not in bundle
    assert members["plan.yaml"] == PLAN_TEXT


def test_the_same_invitation_is_the_same_file(tmp_path: Path, invitation: Invitation, bundle: bytes) -> None:
    write_invitation(tmp_path / "again.zip", invitation)
    assert (tmp_path / "again.zip").read_bytes() == bundle


def test_a_zip_that_was_packed_anew_is_accepted(tmp_path: Path, invitation: Invitation, bundle: bytes) -> None:
    (tmp_path / "packed.zip").write_bytes(_packed(_members(bundle), zipfile.ZIP_DEFLATED))
    assert read_invitation(tmp_path / "packed.zip") == invitation


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda members: members.pop("ca.crt"), "expected exactly"),
        (_with("ca.key", b"secret"), "expected exactly"),
        (_with("../plan.yaml", b""), "expected exactly"),
        (_with("/etc/passwd", b""), "expected exactly"),
        (_with("code.fab", b"other code"), "the hash of code.fab is not the one"),
        (_with("plan.yaml", PLAN_TEXT.replace(b"rounds: 2", b"rounds: 3")), "the hash of plan.yaml is not the one"),
        (_with("plan.yaml", b"version: [1"), "not valid YAML"),
        (_with("plan.yaml", b"\xff\xfe\x00"), "not valid YAML"),
        (_with("plan.yaml", b"version: 2020-99-99"), "not valid YAML"),
        (_with("plan.yaml", b"a: &a [x, x]\nb: [*a, *a]"), "aliases"),
        (_with("plan.yaml", b"[" * 100_000), "levels of YAML"),
        (_with("plan.yaml", b"? [1, 2]\n: 3"), "plan.yaml"),
        (_with("plan.yaml", b"x" * (2**18 + 1)), "accepted are"),
        (_with("ca.crt", b"nothing"), "not the PEM certificate"),
        (_with("invitation.json", b"[]"), "not a JSON mapping"),
        (_with("invitation.json", b"{" * 60_000), "not a JSON mapping"),
        (_with_header(format=2), "format"),
        (_with_header(site="../north"), "site"),
        (_with_header(study="A study"), "study"),
        (_with_header(address="https://lead:8443"), "address"),
        (_with_header(address="lead:99999"), "address"),
        (_with_header(address="lead"), "address"),
        (_with_header(code_hash="00"), "code_hash"),
        (_with_header(versions={"flwr": "1.41"}), "version of fedsemisam"),
        (_with_header(versions=installed_versions() | {"numpy": "2"}), "versions"),
        (_with_header(secret="x"), "unknown key"),
    ],
)
def test_whatever_is_not_an_invitation_is_refused(tmp_path: Path, bundle: bytes, change: Change, says: str) -> None:
    members = _members(bundle)
    change(members)
    assert says in _refusal(tmp_path, _packed(members))


def test_a_certificate_that_is_no_authority_or_not_alone_is_refused(
    tmp_path: Path, bundle: bytes, certificates: Path
) -> None:
    members = _members(bundle)
    for content in (
        (certificates / "server.crt").read_bytes(),
        members["ca.crt"] + (certificates / "ca.key").read_bytes(),
        members["ca.crt"] * 2,
    ):
        assert "ca.crt" in _refusal(tmp_path, _packed(members | {"ca.crt": content}))


def test_a_zip_bomb_is_refused_without_being_unpacked(tmp_path: Path, bundle: bytes) -> None:
    members = _members(bundle) | {"code.fab": bytes(200 * 2**20)}
    packed = _packed(members, zipfile.ZIP_DEFLATED)
    assert "accepted are" in _refusal(tmp_path, packed)
    lying = packed.replace(struct.pack("<I", 200 * 2**20), struct.pack("<I", 1000))
    assert lying != packed
    _refusal(tmp_path, lying)


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path, bundle: bytes) -> None:
    buffer = io.BytesIO(bundle)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("code.fab", b"other code")
    assert "expected exactly" in _refusal(tmp_path, buffer.getvalue())


def test_a_file_that_is_far_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "invitation.zip").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(InvitationError, match="larger than"):
        read_invitation(tmp_path / "invitation.zip")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvitationError, match=r"absent\.zip"):
        read_invitation(tmp_path / "absent.zip")


def test_an_invitation_that_a_site_would_refuse_is_not_written(tmp_path: Path, invitation: Invitation) -> None:
    for wrong in (
        replace(invitation, site="North"),
        replace(invitation, address="lead"),
        replace(invitation, plan_text=b"version: 1"),
        replace(invitation, code=bytes(11 * 2**20)),
    ):
        with pytest.raises(InvitationError):
            write_invitation(tmp_path / "wrong.zip", wrong)
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=8), cut=st.integers(0, 400)
)
def test_damage_is_refused_or_changes_nothing(
    bundle: bytes,
    invitation: Invitation,
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int]],
    cut: int,
) -> None:
    content = bytearray(bundle)
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(bytes(content[: len(content) - cut]))
    try:
        read = read_invitation(path)
    except InvitationError:
        return
    assert (read.plan, read.code, read.site) == (invitation.plan, invitation.code, invitation.site)


@pytest.mark.parametrize("stuffing", [b"\0", b"#!/bin/sh\nexit\n", b"PK\x03\x04"])
def test_data_before_the_zip_is_refused(bundle: bytes, tmp_path: Path, stuffing: bytes) -> None:
    _refused(stuffing + bundle, tmp_path, "before, between or after|not a readable zip")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_byte_can_be_hidden_anywhere_in_the_zip(bundle: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(bundle)))
    hidden = data.draw(st.binary(min_size=1, max_size=40))
    with pytest.raises(InvitationError):
        _parse(bundle[:place] + hidden + bundle[place:], "x")


def test_extra_fields_and_comments_of_members_are_refused(bundle: bytes, tmp_path: Path) -> None:
    for change in ({"extra": b"\x99\x99\x04\x00abcd"}, {"comment": b"hello"}):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in _members(bundle).items():
                info = zipfile.ZipInfo(name)
                for key, value in change.items():
                    setattr(info, key, value)
                archive.writestr(info, content)
        _refused(buffer.getvalue(), tmp_path, "before, between or after")


def test_a_key_that_stands_twice_in_the_header_is_refused(bundle: bytes, tmp_path: Path) -> None:
    members = _members(bundle)
    twice = members["invitation.json"].replace(b'"site": "north"', b'"site": "south", "site": "north"')
    assert twice != members["invitation.json"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (members | {"invitation.json": twice}).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    _refused(buffer.getvalue(), tmp_path, "the key 'site' is given twice")


def test_a_plan_of_countless_keys_is_refused_before_it_is_read() -> None:
    flood = b"".join(b"k%d: 1\n" % number for number in range(10_000))
    assert len(flood) < LIMITS["plan.yaml"]
    with pytest.raises(InvitationError, match="more YAML than any plan holds"):
        _plan(flood, "plan.yaml")


def _refused(content: bytes, folder: Path, why: str) -> None:
    path = folder / "changed.zip"
    path.write_bytes(content)
    with pytest.raises(InvitationError, match=why):
        read_invitation(path)
