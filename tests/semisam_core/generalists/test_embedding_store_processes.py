"""The store in real processes: killed at any moment, sharing a folder, on a full disk."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from semisam_core.generalists.base import VolumeGrid
from semisam_core.generalists.embedding_codec import decoded, encoded
from semisam_core.generalists.embedding_store import EmbeddingStore, scan_key
from tests.semisam_core.generalists.fake import FakeGeneralist

ROOT = Path(__file__).resolve().parents[3]
GRID = VolumeGrid((96, 96, 12), (2.0, 2.0, 2.0))
UNITS = list(range(12))

WRITER = """
import resource, signal, sys
from tests.semisam_core.generalists.test_embedding_store_processes import work
folder, limit, rounds, file_limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if file_limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with an OSError, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
print(work(folder, limit, rounds), flush=True)
"""


def _volume(seed: int) -> torch.Tensor:
    return torch.randn(GRID.shape, generator=torch.Generator().manual_seed(seed))


def _as_coded(embedding: torch.Tensor) -> torch.Tensor:
    coded = encoded(embedding)
    assert coded is not None
    return decoded(coded)


def work(folder: str, limit: int, rounds: int) -> str:
    """Fetch scans repeatedly; return as JSON how many embeddings were wrong and how many writes failed."""
    wrong = failures = 0
    volumes = [_volume(seed) for seed in range(4)]
    print("ready", flush=True)  # noqa: T201 - tells the parent that the imports are done
    for turn in range(rounds):
        store = EmbeddingStore(Path(folder), limit, chunk=2)
        volume = volumes[turn % len(volumes)]
        got = store.fetch(FakeGeneralist(), scan_key(volume), volume, GRID, UNITS)
        wrong += sum(not torch.equal(got[unit], _as_coded(volume[:, :, unit])) for unit in UNITS)
        failures += store.write_failures
    return json.dumps({"wrong": wrong, "failures": failures})


def _start(folder: Path, limit: int, rounds: int, file_limit: int = 0) -> subprocess.Popen[str]:
    arguments = [str(folder), str(limit), str(rounds), str(file_limit)]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen[str]) -> dict[str, int]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    ended: dict[str, int] = json.loads(out.splitlines()[-1])
    return ended


def test_a_process_killed_at_any_moment_leaves_no_wrong_embedding(tmp_path: Path) -> None:
    delays = random.Random(0)
    for _ in range(4):
        process = _start(tmp_path, 300_000, 100_000)
        time.sleep(delays.uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert any(tmp_path.iterdir())
        assert json.loads(work(str(tmp_path), 300_000, 4)) == {"wrong": 0, "failures": 0}


def test_processes_sharing_a_small_store_evict_each_others_entries_and_read_no_wrong_one(tmp_path: Path) -> None:
    limit = 80_000  # about ten embeddings: far fewer than one scan of either process
    together = [_start(tmp_path, limit, 30) for _ in range(2)]
    assert [_end(process) for process in together] == [{"wrong": 0, "failures": 0}] * 2
    # Both may have written at the same time; the next fetch brings the folder within its limit.
    work(str(tmp_path), limit, 1)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


def test_a_disk_that_fills_up_costs_only_time(tmp_path: Path) -> None:
    ended = _end(_start(tmp_path, 10**9, 2, file_limit=4096))
    assert ended["wrong"] == 0
    assert ended["failures"] == 2 * len(UNITS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changed", ["scan", "weights"])
def test_a_stored_embedding_is_never_used_for_a_changed_scan_or_model(tmp_path: Path, changed: str) -> None:
    store = EmbeddingStore(tmp_path, 10**9)
    volume = _volume(0)
    store.fetch(FakeGeneralist(), scan_key(volume), volume, GRID, UNITS)
    other = volume.clone()
    if changed == "scan":
        other[0, 0, 3] += 1.0  # one voxel
    model = FakeGeneralist("1" * 64 if changed == "weights" else "0" * 64)
    store.fetch(model, scan_key(other), other, GRID, UNITS)
    assert model.embedded == UNITS
