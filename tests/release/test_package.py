"""The manifest of an exported package and the signature over it: any change to a package is found."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from release.model import ModelError
from release.package import MANIFEST, SIGNATURE, SIGNER, check, expected_signer, fingerprint, new_key, read_key, seal

CONTENT = {"LICENSE": b"terms\n", "models/model.ts": bytes(range(256)), "docs/README.md": b"# a model\n", "empty": b""}
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LISTED = sorted(CONTENT)
EVERYTHING = [*LISTED, MANIFEST, SIGNATURE, SIGNER]


def _write(folder: Path, key: Ed25519PrivateKey | None = KEY) -> Path:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder, "0" * 64, "1" * 64, key)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return _write(tmp_path / "package")


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield _write(Path(folder) / "package")


def test_an_untouched_package_is_right_and_names_its_signer(package: Path) -> None:
    manifest, signed = check(package)

    assert sorted(manifest.files) == LISTED
    assert signed.fingerprint == fingerprint(KEY.public_key())


def test_an_unsigned_package_says_so(tmp_path: Path) -> None:
    assert check(_write(tmp_path / "package", None))[1].fingerprint is None


def test_the_same_files_give_the_same_manifest_and_signature(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a"), _write(tmp_path / "b")

    assert [(first / name).read_bytes() for name in EVERYTHING] == [(second / name).read_bytes() for name in EVERYTHING]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_found(original: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([each for each in EVERYTHING if each != "empty"]))
    content = bytearray((original / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))

    _expect_a_fault(original, {name: bytes(content)})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([each for each in EVERYTHING if each != "empty"]), st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found(original: Path, name: str, share: float) -> None:
    content = (original / name).read_bytes()

    _expect_a_fault(original, {name: content[: int(share * len(content))]})


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(EVERYTHING), st.binary(min_size=1, max_size=8) | st.just(b"\n"))
def test_anything_appended_is_found(original: Path, name: str, more: bytes) -> None:
    _expect_a_fault(original, {name: (original / name).read_bytes() + more})


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_removed_file_is_found(original: Path, name: str) -> None:
    _expect_a_fault(original, {name: None})


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_renamed_file_is_found(original: Path, name: str) -> None:
    _expect_a_fault(original, {name: None, f"{name}.old": (original / name).read_bytes()})


@pytest.mark.parametrize("name", ["more", "models/more", ".hidden", f"docs/{MANIFEST}", "best.safetensors"])
def test_an_extra_file_is_found_and_named(original: Path, name: str) -> None:
    assert name in _expect_a_fault(original, {name: b"x"})


def _expect_a_fault(original: Path, changes: dict[str, bytes | None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "package"
        shutil.copytree(original, copy)
        for name, content in changes.items():
            if content is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(content)
        with pytest.raises(ModelError) as caught:
            check(copy)
        return str(caught.value)


def test_every_faulty_file_is_named_at_once(package: Path) -> None:
    (package / "LICENSE").unlink()
    (package / "docs/README.md").write_bytes(b"# another model\n")
    (package / "more").touch()

    with pytest.raises(ModelError, match=r"README.md was altered.*LICENSE is missing|LICENSE is missing.*was altered"):
        check(package)
    with pytest.raises(ModelError, match="'more' is not listed"):
        check(package)


def test_a_linked_file_or_folder_is_refused_even_with_the_same_content(package: Path, tmp_path: Path) -> None:
    shutil.move(package / "models", tmp_path / "elsewhere")
    (package / "models").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ModelError, match=r"models/model.ts is a link"):
        check(package)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, SIGNER])
def test_a_linked_manifest_or_signature_is_refused(package: Path, tmp_path: Path, name: str) -> None:
    shutil.move(package / name, tmp_path / name)
    (package / name).symlink_to(tmp_path / name)

    with pytest.raises(ModelError, match=f"{name} is a link"):
        check(package)


def test_a_pipe_among_the_files_is_found_and_not_waited_for(package: Path) -> None:
    os.mkfifo(package / "pipe")

    with pytest.raises(ModelError, match="'pipe' is not listed"):
        check(package)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "models/../LICENSE", "./LICENSE", "models//model.ts", "a\\b", "a\nb", ""]
)
def test_a_manifest_may_only_name_plain_paths_within_the_package(package: Path, name: str) -> None:
    content = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    content["files"][name] = content["files"]["LICENSE"]
    _sign(package, content)

    with pytest.raises(ModelError, match="the manifest is damaged"):
        check(package)


@pytest.mark.parametrize("change", [{"version": 2}, {"more": 1}, {"files": []}, {"weights_sha256": "0" * 63}])
def test_a_manifest_of_another_form_is_refused_though_signed(package: Path, change: dict[str, object]) -> None:
    _sign(package, json.loads((package / MANIFEST).read_text(encoding="utf-8")) | change)

    with pytest.raises(ModelError, match="the manifest is damaged"):
        check(package)


def test_a_manifest_altered_together_with_its_file_needs_the_key(package: Path) -> None:
    signature = (package / SIGNATURE).read_bytes()
    (package / "LICENSE").write_bytes(b"do as you like\n")
    (package / MANIFEST).unlink()
    seal(package, "0" * 64, "1" * 64, None)
    (package / SIGNATURE).write_bytes(signature)

    with pytest.raises(ModelError, match="the signature does not fit"):
        check(package)


def test_another_signer_shows_as_another_fingerprint(package: Path) -> None:
    seal(package, "0" * 64, "1" * 64, Ed25519PrivateKey.generate())

    assert check(package)[1].fingerprint != fingerprint(KEY.public_key())


def _sign(package: Path, manifest: object) -> None:
    content = (json.dumps(manifest, sort_keys=True, indent=1) + "\n").encode()
    (package / MANIFEST).write_bytes(content)
    (package / SIGNATURE).write_bytes(KEY.sign(content).hex().encode())


def test_a_new_key_is_readable_by_its_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "release.key"
    made = new_key(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert fingerprint(read_key(path).public_key()) == made
    with pytest.raises(ModelError, match="never overwritten"):
        new_key(path)


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key", encoding="utf-8")

    with pytest.raises(ModelError, match="no private key can be read"):
        read_key(tmp_path / "key")
    with pytest.raises(ModelError, match="neither a fingerprint"):
        expected_signer(str(tmp_path / "key"))
    with pytest.raises(ModelError, match="neither a fingerprint"):
        expected_signer("3f0c")


def test_a_signer_is_named_by_fingerprint_or_by_the_file_of_the_public_key(package: Path) -> None:
    expected = fingerprint(KEY.public_key())

    assert expected_signer(expected.upper()) == expected
    assert expected_signer(str(package / SIGNER)) == expected
