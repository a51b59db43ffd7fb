"""The fuzzer of the intake: a few inputs of each surface are without fault, and each kind of fault is found."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intake.conversion import convert
from intake.guards import Worker
from intake.volume import IntakeError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # a folder of scripts; for children too
fuzz_intake: Any = importlib.import_module("fuzz_intake")
SURFACES: dict[str, Any] = fuzz_intake.SURFACES
Sandbox = Any


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(fuzz_intake.read, fuzz_intake.LIMITS) as running:
        yield running


@pytest.mark.parametrize("surface", SURFACES)
def test_a_few_inputs_of_each_surface_are_taken_or_refused(tmp_path: Path, worker: Worker, surface: str) -> None:
    for number in range(6):
        found = fuzz_intake._tried(surface, 1, number, tmp_path, worker)
        assert found["kind"] in ("accepted", "refused"), found["says"]
        assert found["kind"] == "accepted" or len(found["says"]) >= 10


def test_an_input_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for surface, make in SURFACES.items():
        made = []
        for name in ("a", "b"):
            box = fuzz_intake.Sandbox(tmp_path / surface / name)
            make(random.Random(f"5/{surface}/2"), box)
            files = (path for path in box.source.rglob("*") if path.is_file() and not path.is_symlink())
            made.append({path.name: path.read_bytes() for path in files if path.suffix != ".h5"})
        if surface not in ("nrrd", "metaimage"):  # they name a file by its whole path
            assert made[0] == made[1]


def _unexpected(box: Sandbox) -> None:
    raise KeyError(str(box.root))


def _speechless(box: Sandbox) -> None:
    raise IntakeError("no")


def _greedy(box: Sandbox) -> None:
    raise MemoryError


def _outside(box: Sandbox) -> None:
    (box.root / "x").write_text("written")


def _altered(box: Sandbox) -> None:
    os.utime(box.root / "secret.raw", (1, 1))


def _leaking(box: Sandbox) -> None:
    (box.out / "images").mkdir(parents=True)
    (box.out / "images" / "x").write_bytes(np.full(100, fuzz_intake.SECRET, np.int16).tobytes())


def _naming(box: Sandbox) -> None:
    box.out.mkdir()
    (box.out / "manifest.json").write_text("MRN-4711")


@pytest.mark.parametrize("deed", [_unexpected, _speechless, _greedy, _outside, _altered, _leaking, _naming])
def test_each_kind_of_fault_is_found_and_its_input_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: Callable[[Sandbox], None]
) -> None:
    def surface(_: random.Random, box: Sandbox) -> Callable[[Worker], None]:
        return lambda _: deed(box)

    monkeypatch.setitem(SURFACES, "nifti", surface)
    found = fuzz_intake._tried("nifti", 0, 7, tmp_path, Worker(convert))
    assert found["kind"] == "fault"
    assert found["says"]
    assert (tmp_path / "nifti-7" / "in").is_dir()
