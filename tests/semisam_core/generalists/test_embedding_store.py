"""A scan is encoded once, despite kills, damaged files and full disks."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.generalists.base import VolumeGrid
from semisam_core.generalists.embedding_codec import decoded, encoded
from semisam_core.generalists.embedding_store import EmbeddingStore, entry_name, scan_key
from tests.semisam_core.generalists.fake import FakeGeneralist

ROOMY = 10**9
GRID = VolumeGrid((20, 20, 10), (2.0, 2.0, 2.0))


def _volume(seed: int = 0) -> torch.Tensor:
    return torch.randn((20, 20, 10), generator=torch.Generator().manual_seed(seed))


def _fetch(store: EmbeddingStore, model: FakeGeneralist, *units: int, seed: int = 0) -> dict[int, torch.Tensor]:
    volume = _volume(seed)
    return store.fetch(model, scan_key(volume), volume, GRID, units)


def _as_coded(embedding: torch.Tensor) -> torch.Tensor:
    coded = encoded(embedding)
    assert coded is not None
    return decoded(coded)


def test_a_scan_is_encoded_once_across_processes(tmp_path: Path) -> None:
    model = FakeGeneralist()
    first = _fetch(EmbeddingStore(tmp_path, ROOMY), model, 1, 2, 3)
    again = EmbeddingStore(tmp_path, ROOMY)
    second = _fetch(again, model, 1, 2, 3)
    assert model.embedded == [1, 2, 3]
    assert (again.hits, again.misses) == (3, 0)
    assert all(torch.equal(first[unit], second[unit]) for unit in (1, 2, 3))


def test_only_missing_units_are_encoded(tmp_path: Path) -> None:
    model, store = FakeGeneralist(), EmbeddingStore(tmp_path, ROOMY)
    _fetch(store, model, 1, 2)
    _fetch(store, model, 2, 3)
    assert model.embedded == [1, 2, 3]


def test_values_are_as_coded_when_computed_and_when_read(tmp_path: Path) -> None:
    as_coded = _as_coded(_volume()[:, :, 4])
    assert torch.equal(_fetch(EmbeddingStore(tmp_path, ROOMY), FakeGeneralist(), 4)[4], as_coded)
    assert torch.equal(_fetch(EmbeddingStore(tmp_path, ROOMY), FakeGeneralist(), 4)[4], as_coded)
    assert torch.equal(_fetch(EmbeddingStore(tmp_path, 0), FakeGeneralist(), 4)[4], as_coded)


def test_scan_voxel_size_preprocessing_weights_and_unit_each_make_another_entry() -> None:
    model, other, otherwise = FakeGeneralist(), FakeGeneralist("1" * 64), FakeGeneralist()
    otherwise.card = replace(otherwise.card, preprocessing="another")
    names = {
        entry_name(model, "a", GRID, 0),
        entry_name(model, "b", GRID, 0),
        entry_name(model, "a", GRID, 1),
        entry_name(other, "a", GRID, 0),
        entry_name(otherwise, "a", GRID, 0),
        entry_name(model, "a", VolumeGrid(GRID.shape, (2.0, 2.0, 3.0)), 0),
    }
    assert len(names) == 6
    assert scan_key(_volume()) != scan_key(_volume(1))
    assert scan_key(_volume()) != scan_key(_volume().reshape(10, 20, 20))


@pytest.mark.parametrize("damage", ["truncated", "empty", "swapped"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    model, store = FakeGeneralist(), EmbeddingStore(tmp_path, ROOMY)
    good = _fetch(store, model, 1, 2)
    one, two = sorted(tmp_path.iterdir())
    content = {"truncated": one.read_bytes()[:-10], "empty": b"", "swapped": two.read_bytes()}[damage]
    one.write_bytes(content)
    again = _fetch(EmbeddingStore(tmp_path, ROOMY), model, 1, 2)
    assert len(model.embedded) == 3
    assert all(torch.equal(good[unit], again[unit]) for unit in (1, 2))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_passes_over_more_scans_than_fit_find_limit_over_size_of_them(tmp_path: Path, share: float) -> None:
    scans, model = range(12), FakeGeneralist()
    for seed in scans:
        _fetch(EmbeddingStore(tmp_path / "all", ROOMY), model, *range(10), seed=seed)
    limit = int(share * _size(tmp_path / "all"))
    for turn in range(3):
        store = EmbeddingStore(tmp_path / "some", limit)
        for seed in scans:
            _fetch(store, model, *range(10), seed=seed)
            assert _size(tmp_path / "some") <= limit
        rate = store.hits / (store.hits + store.misses)
        assert rate > share - 0.02 if turn else rate == 0
        assert rate < share + 0.02


def test_entries_of_a_study_that_ended_make_room_first(tmp_path: Path) -> None:
    model, first, last = FakeGeneralist(), range(10), range(5)
    _fetch(EmbeddingStore(tmp_path, ROOMY), model, *first)
    long_ago = time.time() - 15 * 24 * 3600
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    limit = _size(tmp_path)
    _fetch(EmbeddingStore(tmp_path, limit), model, 0, 1)  # still of use
    _fetch(EmbeddingStore(tmp_path, limit), model, *last, seed=1)
    store = EmbeddingStore(tmp_path, limit)
    _fetch(store, model, 0, 1)
    _fetch(store, model, *last, seed=1)
    assert (store.hits, store.misses) == (7, 0)


def test_a_limit_of_zero_keeps_nothing(tmp_path: Path) -> None:
    model = FakeGeneralist()
    for _ in range(2):
        _fetch(EmbeddingStore(tmp_path / "store", 0), model, 1)
    assert model.embedded == [1, 1]


def test_a_full_disk_costs_only_time_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("semisam_core.generalists.embedding_store.write_atomically", full)
    store = EmbeddingStore(tmp_path, ROOMY)
    with caplog.at_level(logging.WARNING):
        got = _fetch(store, FakeGeneralist(), 1, 2, 3)
    assert sorted(got) == [1, 2, 3]
    assert store.write_failures == 3
    assert sum("could not be written to disk" in line for line in caplog.messages) == 1


def test_a_kill_loses_at_most_one_chunk(tmp_path: Path) -> None:
    class Killed(FakeGeneralist):
        def embed(self, volume: torch.Tensor, grid: VolumeGrid, units: object) -> dict[int, torch.Tensor]:
            if len(self.embedded) >= 4:
                raise KeyboardInterrupt
            return super().embed(volume, grid, list(units))

    with pytest.raises(KeyboardInterrupt):
        _fetch(EmbeddingStore(tmp_path, ROOMY, chunk=2), Killed(), 0, 1, 2, 3, 4, 5)
    model = FakeGeneralist()
    _fetch(EmbeddingStore(tmp_path, ROOMY), model, 0, 1, 2, 3, 4, 5)
    assert model.embedded == [4, 5]


def test_progress_is_reported_from_first_to_last(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    volume = _volume()
    store = EmbeddingStore(tmp_path, ROOMY, chunk=2)
    store.fetch(FakeGeneralist(), scan_key(volume), volume, GRID, [0, 1, 2], lambda done, of: seen.append((done, of)))
    assert seen == [(0, 3), (2, 3), (3, 3)]


@settings(deadline=None, max_examples=20)
@given(units=st.lists(st.integers(0, 9), unique=True, max_size=10))
def test_values_do_not_depend_on_which_units_are_fetched_in_what_order(
    tmp_path_factory: pytest.TempPathFactory, units: list[int]
) -> None:
    got = _fetch(EmbeddingStore(tmp_path_factory.mktemp("store"), ROOMY, chunk=3), FakeGeneralist(), *units)
    assert list(got) == units
    assert all(torch.equal(got[unit], _as_coded(_volume()[:, :, unit])) for unit in units)


def test_an_unusable_folder_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    got = _fetch(EmbeddingStore(tmp_path / "store", ROOMY), FakeGeneralist(), 1, 2)
    assert torch.equal(got[2], _as_coded(_volume()[:, :, 2]))
