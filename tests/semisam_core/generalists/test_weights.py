"""Weights are read only where the file is the expected one and holds tensors, and nothing in it is ever run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from semisam_core.errors import WeightsError
from semisam_core.generalists.weights import load_into, load_verified_state, verified_sha256

PUBLISHED = "tiny.pth (Apache-2.0) of example.org"
CPU = torch.device("cpu")


def _network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3))


def _saved(path: Path, content: object) -> str:
    """Write what torch.save writes; return the SHA-256 of the file."""
    torch.save(content, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _same(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_file_with_the_expected_hash_gives_its_tensors_and_its_hash(tmp_path: Path) -> None:
    state = _network().state_dict()
    sha256 = _saved(tmp_path / "w.pth", state)
    found, hashed = load_verified_state(tmp_path / "w.pth", sha256, PUBLISHED, CPU)
    assert _same(found, state)
    assert hashed == sha256 == verified_sha256(tmp_path / "w.pth", sha256, PUBLISHED)


def test_the_expected_hash_may_be_written_in_capitals(tmp_path: Path) -> None:
    sha256 = _saved(tmp_path / "w.pth", _network().state_dict())
    assert load_verified_state(tmp_path / "w.pth", sha256.upper(), PUBLISHED, CPU)[1] == sha256


def test_without_an_expected_hash_any_file_of_tensors_is_read(tmp_path: Path) -> None:
    sha256 = _saved(tmp_path / "w.pth", _network().state_dict())
    assert load_verified_state(tmp_path / "w.pth", None, PUBLISHED, CPU)[1] == sha256
    assert verified_sha256(tmp_path / "w.pth", None, PUBLISHED) == sha256


def test_another_hash_names_the_file_what_was_found_what_was_expected_and_what_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "altered.pth"
    sha256 = _saved(path, _network().state_dict())
    for read in (
        lambda: verified_sha256(path, "a" * 64, PUBLISHED),
        lambda: load_verified_state(path, "a" * 64, PUBLISHED, CPU),
    ):
        with pytest.raises(WeightsError) as caught:
            read()
        for part in (str(path), f"SHA-256 {sha256}", f"expected {'a' * 64}", PUBLISHED):
            assert part in str(caught.value)


@settings(deadline=None, max_examples=25)
@given(content=st.binary(min_size=1, max_size=200), place=st.integers(0, 199), bit=st.integers(0, 7))
def test_one_bit_changed_is_another_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("bit") / "w.pth"
    altered = bytearray(content)
    altered[place % len(content)] ^= 1 << bit
    path.write_bytes(altered)
    with pytest.raises(WeightsError, match="expected"):
        verified_sha256(path, hashlib.sha256(content).hexdigest(), PUBLISHED)


@pytest.mark.parametrize("name", ["absent.pth", "folder"])
def test_a_file_that_cannot_be_opened_is_named_with_what_is_accepted(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError) as caught:
        load_verified_state(tmp_path / name, None, PUBLISHED, CPU)
    assert f"{tmp_path / name}: the weights file cannot be read" in str(caught.value)
    assert PUBLISHED in str(caught.value)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_tensors_may_lie_under_the_names_that_training_scripts_use(tmp_path: Path, wrapper: str) -> None:
    state = _network().state_dict()
    _saved(tmp_path / "w.pth", {wrapper: state, "epoch": 3})
    assert _same(load_verified_state(tmp_path / "w.pth", None, PUBLISHED, CPU)[0], state)


class _Attack:
    """A pickle that makes a folder when it is rebuilt."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._witness),)


def _zip_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_the_attack_of_these_tests_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Attack(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


def _bare_pickle(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("write", [_zip_of, _bare_pickle], ids=["torch archive", "bare pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_whose_pickle_would_run_code_is_refused_and_not_run(tmp_path: Path, write: Any, nested: bool) -> None:
    path, witness = tmp_path / "w.pth", tmp_path / "witness"
    attack = _Attack(witness)
    path.write_bytes(write({"model": {"weight": torch.zeros(2)}, "extra": attack} if nested else attack))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match="not a file of PyTorch tensors that can be read safely") as caught:
        load_verified_state(path, sha256, PUBLISHED, CPU)
    assert str(path) in str(caught.value)
    assert not witness.exists()


@settings(deadline=None, max_examples=25)
@given(share=st.floats(0, 0.99))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    whole = _zip_of(_network().state_dict())
    path = tmp_path_factory.mktemp("torn") / "w.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError) as caught:
        load_verified_state(path, None, PUBLISHED, CPU)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "no named tensors"),
        ([torch.zeros(2)], "no named tensors"),
        (torch.zeros(2), "no named tensors"),
        ({"model": {}}, "no named tensors"),
        ({"weight": torch.zeros(2), "epoch": 3}, "other things than named tensors"),
        ({"model": {"weight": [1.0, 2.0]}}, "other things than named tensors"),
    ],
)
def test_a_file_that_holds_no_named_tensors_is_refused(tmp_path: Path, content: object, says: str) -> None:
    _saved(tmp_path / "w.pth", content)
    with pytest.raises(WeightsError, match=says) as caught:
        load_verified_state(tmp_path / "w.pth", None, PUBLISHED, CPU)
    assert PUBLISHED in str(caught.value)


def test_tensors_of_the_same_architecture_replace_the_networks_own(tmp_path: Path) -> None:
    state, network = _network(seed=1).state_dict(), _network(seed=2)
    load_into(network, dict(state), tmp_path / "w.pth", PUBLISHED)
    assert _same(network.state_dict(), state)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda state: state | {"extra": torch.zeros(2)}, id="one too many"),
        pytest.param(lambda state: {name: state[name] for name in list(state)[1:]}, id="one missing"),
        pytest.param(lambda state: state | {"1.bias": torch.zeros(7)}, id="another shape"),
    ],
)
def test_tensors_of_another_architecture_are_refused_with_their_number(tmp_path: Path, change: Any) -> None:
    state = change(dict(_network().state_dict()))
    with pytest.raises(WeightsError, match="another architecture than Sequential") as caught:
        load_into(_network(), state, tmp_path / "w.pth", PUBLISHED)
    for part in (str(tmp_path / "w.pth"), f"{len(state)} tensors found, 4 needed", PUBLISHED):
        assert part in str(caught.value)
