"""Weights have the expected hash and are read as tensors only."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from semisam_core.errors import ConfigError, WeightsError
from semisam_core.generalists import accepted_prompts, load_generalist
from semisam_core.generalists.weights import load_into, load_verified_state

CPU = torch.device("cpu")


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.target, "w")


def _load(path: Path, expected: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    return load_verified_state(path, expected, "the published file", CPU)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_tensors_are_found_bare_or_nested(tmp_path: Path, wrapper: str | None) -> None:
    state = nn.Linear(2, 1).state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    found, sha256 = _load(tmp_path / "w.pth")
    assert found.keys() == state.keys()
    assert sha256 == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()


def test_the_error_for_a_wrong_hash_names_the_file_and_both_hashes(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "w.pth")
    found = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=rf"w\.pth: .*SHA-256 {found}, expected {'a' * 64}; accepted is the publ"):
        _load(tmp_path / "w.pth", "a" * 64)


def test_code_in_a_weights_file_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    with (tmp_path / "trap.pth").open("wb") as file:
        pickle.dump({"model": Trap(str(target))}, file)
    torch.save({"model": Trap(str(target))}, tmp_path / "zip.pth")
    for name in ("trap.pth", "zip.pth"):
        with pytest.raises(WeightsError, match="read safely"):
            _load(tmp_path / name)
    assert not target.exists()


def test_errors_name_a_missing_torn_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth: the weights file cannot be read"):
        _load(tmp_path / "absent.pth")
    torch.save(nn.Linear(50, 50).state_dict(), tmp_path / "torn.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "torn.pth").read_bytes()[:500])
    torch.save({}, tmp_path / "empty.pth")
    for name in ("torn.pth", "empty.pth"):
        with pytest.raises(WeightsError, match=name):
            _load(tmp_path / name)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do not fit Linear"):
        load_into(nn.Linear(3, 1), nn.Linear(2, 1).state_dict(), tmp_path / "w.pth", "the published file")


def test_the_error_for_an_unknown_generalist_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no generalist is named 'sam-9'; accepted are .*lite-medsam"):
        accepted_prompts("sam-9")
    with pytest.raises(ConfigError, match="accepted are"):
        load_generalist("sam-9", CPU)
