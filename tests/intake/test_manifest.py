"""Manifests name files of their folder only, each once; pseudonyms depend on the key, and on all of what they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intake.importing import Import, Settings
from intake.manifest import read_manifest
from intake.pseudonyms import Pseudonyms, key_at
from intake.volume import IntakeError

HASH = "0" * 64
CHANNEL = {"sha256": HASH, "modality": "CT", "series": HASH, "shape": [8, 8, 8], "spacing_mm": [1.0, 1.0, 1.0]}


def _manifest(folder: Path, *files: str) -> Path:
    cases: list[dict[str, Any]] = [
        {"case": f"p-{k}", "patient": "p", "label": None, "source": HASH, "settings": HASH}
        | {"channels": [CHANNEL | {"file": file}]}
        for k, file in enumerate(files)
    ]
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "cases": cases}))
    return folder / "manifest.json"


@pytest.mark.parametrize(
    "file",
    [
        "etc/passwd",
        "images",
        "images/../x",
        "../images/x",
        "/images/x",
        "images/a/b",
        "images\\x",
        "images/..",
        "private/x",
    ],
)
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    assert read_manifest(_manifest(tmp_path, "images/a.nii.gz")).patient_of("p-0") == "p"
    with pytest.raises(IntakeError, match=r"cases\.0\.channels\.0\.file"):
        read_manifest(_manifest(tmp_path, file))


def test_a_manifest_that_lists_a_file_twice_is_refused(tmp_path: Path) -> None:
    assert len(read_manifest(_manifest(tmp_path, "images/a.nii.gz", "images/b.nii.gz")).cases) == 2
    with pytest.raises(IntakeError, match="listed twice"):
        read_manifest(_manifest(tmp_path, "images/a.nii.gz", "images/a.nii.gz"))


def test_pseudonyms_depend_on_the_key_and_on_each_part() -> None:
    first, second = Pseudonyms(b"1" * 32), Pseudonyms(b"2" * 32)
    assert first.patient("A") == Pseudonyms(b"1" * 32).patient("A") != second.patient("A")
    assert first.digest("a", "bc") != first.digest("ab", "c")
    assert first.case("A", "1") != first.case("A", "2")


def test_two_patients_who_would_share_a_pseudonym_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pseudonyms, "digest", lambda *_: HASH)
    pseudonyms = Pseudonyms(b"1" * 32)
    pseudonyms.patient("A")
    pseudonyms.patient("A")
    with pytest.raises(IntakeError, match="two patients"):
        pseudonyms.patient("B")


def test_a_key_is_the_owners_and_whole(tmp_path: Path) -> None:
    key = tmp_path / "key"
    made = key_at(key)
    assert key_at(key) == made
    assert key.stat().st_mode & 0o077 == 0
    for content in ("", "ab", "ab" * 31, "zz" * 32):
        key.write_text(content)
        with pytest.raises(IntakeError, match="64 hexadecimal digits"):
            key_at(key)
        with pytest.raises(IntakeError, match="64 hexadecimal digits"):
            Import(tmp_path / "out", Settings(key=key))
