"""Generalists by name: errors say what is accepted, and each is loaded once per process."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semisam_core.errors import ConfigError
from semisam_core.generalists import registry
from semisam_core.generalists.base import PromptKind
from semisam_core.generalists.registry import (
    GeneralistSpec,
    accepted_prompts,
    generalist_names,
    load_generalist,
    register,
)
from tests.semisam_core.generalists.fake import CARD, FakeGeneralist

CPU = torch.device("cpu")


class Counting:
    """A loader that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.device, Path | None, str | None]] = []

    def __call__(self, device: torch.device, weights: Path | None, sha256: str | None) -> FakeGeneralist:
        self.calls.append((device, weights, sha256))
        return FakeGeneralist()


@pytest.fixture
def loader() -> Counting:
    return Counting()


@pytest.fixture
def name(loader: Counting, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a generalist for one test; return its name."""
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    monkeypatch.setattr(registry, "_loaded", {})
    card = replace(CARD, name="counting", prompt_kinds=frozenset({PromptKind.POINTS_2D}))
    register(GeneralistSpec(card, loader, packaged=True))
    return "counting"


def test_lite_medsam_is_registered_and_takes_only_boxes() -> None:
    assert "lite-medsam" in generalist_names()
    assert accepted_prompts("lite-medsam") == {PromptKind.BOX_2D}


def test_names_are_in_alphabetical_order(name: str) -> None:
    names = generalist_names()
    assert list(names) == sorted(names)
    assert {"lite-medsam", "sam", "medsam", "sam-med3d", "sam-med3d-turbo", "seganypet", "sam2", "vista3d", name} <= {
        *names
    }


def test_the_prompts_of_a_generalist_are_known_without_loading_it(name: str, loader: Counting) -> None:
    assert accepted_prompts(name) == {PromptKind.POINTS_2D}
    assert loader.calls == []


def test_the_error_for_an_unknown_name_lists_the_accepted_ones() -> None:
    for ask in (lambda: accepted_prompts("sam-9"), lambda: load_generalist("sam-9", CPU)):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert str(caught.value) == f"no generalist is named 'sam-9'; accepted are {', '.join(generalist_names())}"


def test_a_taken_name_is_refused_and_keeps_its_generalist(name: str, loader: Counting) -> None:
    with pytest.raises(ValueError, match=f"a generalist named {name} is already registered; choose another name"):
        register(GeneralistSpec(replace(CARD, name=name), Counting()))
    load_generalist(name, CPU)
    assert len(loader.calls) == 1


def test_registering_the_same_one_twice_changes_nothing(name: str) -> None:
    before = generalist_names()
    register(registry._SPECS[name])
    assert generalist_names() == before


def test_a_generalist_is_loaded_once_per_process(name: str, loader: Counting) -> None:
    assert load_generalist(name, CPU) is load_generalist(name, CPU)
    assert len(loader.calls) == 1


def test_the_same_weights_by_another_path_are_the_same_generalist(name: str, loader: Counting, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    (tmp_path / "inner").mkdir()
    sha256 = hashlib.sha256(b"weights").hexdigest()
    first = load_generalist(name, CPU, tmp_path / "w.pth", sha256)
    assert load_generalist(name, CPU, tmp_path / "inner" / ".." / "w.pth", sha256.upper()) is first
    assert loader.calls == [(CPU, tmp_path / "w.pth", sha256)]


def test_other_weights_another_hash_or_another_device_make_another_generalist(
    name: str, loader: Counting, tmp_path: Path
) -> None:
    asked: list[tuple[torch.device, Path | None, str | None]] = [
        (CPU, None, None),
        (torch.device("meta"), None, None),
        (CPU, (tmp_path / "w.pth").resolve(), None),
        (CPU, (tmp_path / "w.pth").resolve(), "0" * 64),
        (CPU, (tmp_path / "v.pth").resolve(), "0" * 64),
    ]
    loaded = [load_generalist(name, *each) for each in asked]
    assert len({id(each) for each in loaded}) == len(asked)
    assert loader.calls == asked


def test_a_failed_load_is_retried(name: str) -> None:
    attempts: list[int] = []

    def flaky(device: torch.device, weights: Path | None, sha256: str | None) -> FakeGeneralist:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("the disk was away")
        return FakeGeneralist()

    register(GeneralistSpec(replace(CARD, name=f"{name}-flaky"), flaky, packaged=True))
    with pytest.raises(OSError, match="the disk was away"):
        load_generalist(f"{name}-flaky", CPU)
    assert load_generalist(f"{name}-flaky", CPU) is load_generalist(f"{name}-flaky", CPU)
    assert len(attempts) == 2
