"""Updates are kept on disk and read back unchanged, in an order that does not depend on arrival."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semisam_core.aggregation.weighted_mean import weighted_mean
from server.updates import MemoryUpdate, UpdateShelf, change_norm

REFERENCE = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "n": torch.tensor([3])}


def _weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "n": torch.tensor([seed]),
        "a": torch.randn(2, 3, generator=generator),
        "b": torch.randn((), generator=generator),
    }


def test_an_update_is_read_back_unchanged_with_its_scalars_and_norm(tmp_path: Path) -> None:
    shelf = UpdateShelf(tmp_path)
    weights = _weights(5)
    shelf.add("alpha", weights, {"labeled": 2}, REFERENCE)
    (update,) = shelf.updates
    assert update.site == "alpha"
    assert update.scalars == {"labeled": 2}
    assert tuple(update.names) == tuple(REFERENCE)
    assert all(torch.equal(update.tensor(name), weights[name]) for name in REFERENCE)
    assert update.size_bytes == update.path.stat().st_size
    squares = sum(float(((weights[name] - REFERENCE[name]).double() ** 2).sum()) for name in REFERENCE)
    assert update.change_norm == pytest.approx(math.sqrt(squares))


def test_an_unchanged_specialist_has_norm_zero() -> None:
    assert change_norm(REFERENCE, REFERENCE) == 0.0


@pytest.mark.parametrize("order", list(itertools.permutations(["gamma", "alpha", "beta"])))
def test_the_order_of_arrival_changes_neither_the_shelf_nor_the_mean(order: tuple[str, ...], tmp_path: Path) -> None:
    seeds = {"alpha": 1, "beta": 2, "gamma": 3}
    shelf = UpdateShelf(tmp_path)
    for site in order:
        shelf.add(site, _weights(seeds[site]), {}, REFERENCE)
    assert [update.site for update in shelf.updates] == ["alpha", "beta", "gamma"]
    shares = [0.2, 0.3, 0.5]
    in_memory = weighted_mean([MemoryUpdate(site, _weights(seed), {}) for site, seed in seeds.items()], shares)
    shelved = weighted_mean(shelf.updates, shares)
    assert all(torch.equal(in_memory[name], shelved[name]) for name in REFERENCE)


def test_a_dropped_update_is_removed_from_shelf_and_disk(tmp_path: Path) -> None:
    shelf = UpdateShelf(tmp_path)
    for k, site in enumerate(("alpha", "beta")):
        shelf.add(site, _weights(k), {}, REFERENCE)
    shelf.drop("alpha")
    shelf.drop("unknown")
    assert [update.site for update in shelf.updates] == ["beta"]
    assert [path.name for path in tmp_path.iterdir()] == ["beta.safetensors"]
    shelf.clear()
    assert shelf.updates == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_update_of_a_site_is_an_error_and_the_first_stays(tmp_path: Path) -> None:
    shelf = UpdateShelf(tmp_path)
    shelf.add("alpha", _weights(1), {}, REFERENCE)
    with pytest.raises(ValueError, match="already an update from site alpha"):
        shelf.add("alpha", _weights(2), {}, REFERENCE)
    assert torch.equal(shelf.updates[0].tensor("a"), _weights(1)["a"])


def test_files_left_by_a_killed_server_are_removed_and_not_mistaken_for_updates(tmp_path: Path) -> None:
    UpdateShelf(tmp_path).add("alpha", _weights(1), {}, REFERENCE)
    (tmp_path / ".beta.safetensors.x1").write_bytes(b"half")
    assert UpdateShelf(tmp_path).updates == []
    assert list(tmp_path.iterdir()) == []
