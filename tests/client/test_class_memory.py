"""The memory that a site takes does not grow with the number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.labeling import Labeler
from client.progress import ProgressLog
from client.site import Site
from client.site_config import load_site_config
from semisam_core import scratch
from semisam_core.data import resampling
from semisam_core.data.cases import Role
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.sources.head_network import feature_head_of
from tests.conftest import tiny_plan, write_nifti, write_site

SHAPE, FEW, MANY = (64, 64, 64), 2, 26
MAP_MB = 4e-6 * math.prod(SHAPE)  # one class of one scan in single precision
EVIDENCE = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources={feature_head: {generalist: fake, steps_per_round: 1, batch: 1}, "
    "registration: {iterations: 1}, prototypes: {generalist: fake}}",
)


class _Tones(nn.Module):
    """A specialist that tells classes apart by their intensity."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("tones", torch.arange(1 + classes) / MANY)

    def forward(self, patches: Tensor) -> Tensor:
        tones: Tensor = self.tones
        return -(((patches - tones.view(1, -1, 1, 1, 1)) * 6 * MANY) ** 2)


def _scan(classes: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """Return a scan in which the k-th class is a cuboid of intensity k, which is also its label."""
    label, cells = np.zeros(SHAPE, np.uint8), math.ceil(classes ** (1 / 3))
    for k in range(classes):
        corner = (k % cells, k // cells % cells, k // cells**2)
        box = [
            slice(round((c + 0.2) * s / cells), round((c + 0.8) * s / cells))
            for c, s in zip(corner, SHAPE, strict=True)
        ]
        label[tuple(box)] = 1 + k
    return label


def _plan(classes: int, *changes: str) -> Plan:
    named = ", ".join(f"{{name: c{k}, value: {k}}}" for k in range(1, 1 + classes))
    return tiny_plan(
        f"task.classes=[{named}]",
        f"data.intensity={{kind: window, lower: 0, upper: {MANY}}}",
        "pseudo_labels.prompting.margins_mm=[0.0]",
        "pseudo_labels.prompting.slice_step_mm=8.0",
        "pseudo_labels.gates.minimum_volume_ml=0.0",
        *changes,
    )


def _write(folder: Path, classes: int) -> Path:
    for case in ("case-0", "case-1", "case-2"):
        for kind in ("images", "labels"):
            write_nifti(folder / "data" / "alpha" / kind / f"{case}.nii.gz", _scan(classes))
    return write_site(folder, "alpha")


def _peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def _taken_mb(work: Callable[[], object]) -> float:
    """Return how much memory some work takes at most, beyond what the process has."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mb()
    work()
    return _peak_mb() - before


def _growth_mb(folder: Path, prepare: Callable[[Path, int], Callable[[], object]]) -> float:
    found = []
    for number, classes in enumerate((FEW, FEW, MANY)):  # the first also loads libraries
        (folder / str(number)).mkdir()
        found.append(_taken_mb(prepare(_write(folder / str(number), classes), classes)))
    return found[2] - found[1]


@pytest.mark.parametrize("changes", [(), EVIDENCE], ids=["semisam+", "evidence"])
def test_making_a_pseudo_label(tmp_path: Path, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BLOCK", 1 << 15)  # so that a scan this small has several blocks

    def prepare(path: Path, classes: int) -> Callable[[], object]:
        plan = _plan(classes, *changes)
        site, head = Site(load_site_config(path), plan, "run", 1), feature_head_of(plan)
        progress = ProgressLog(path.parent / "progress.jsonl", 1)
        labeler = Labeler(site.config, plan, site.state.folder, torch.device("cpu"), progress)
        unlabeled, labeled = site.scans.keyed_pair_loaders(Role.UNLABELED), site.scans.pair_loaders(Role.LABELED)

        def work() -> None:
            labels = labeler.labels(1, _Tones(classes), unlabeled, labeled, head)
            assert 2 * int(labels["case-1"].valid.sum()) >= classes

        return work

    assert _growth_mb(tmp_path, prepare) < 0.5 * (MANY - FEW) * MAP_MB


def test_training_the_feature_head(tmp_path: Path) -> None:
    def prepare(path: Path, classes: int) -> Callable[[], object]:
        plan = _plan(classes, *EVIDENCE)
        site, head = Site(load_site_config(path), plan, "run", 1), feature_head_of(plan)
        assert head is not None
        known = site.scans.pair_loaders(Role.LABELED)
        return lambda: site._labeler.train_head(head, known, 1, 0)

    assert _growth_mb(tmp_path, prepare) < 0.25 * (MANY - FEW) * MAP_MB


@pytest.mark.parametrize("message", ["join", "evaluate"])
def test_joining_and_evaluating(tmp_path: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "BLOCK_BYTES", 2_000_000)  # so that a scan this small has several blocks
    monkeypatch.setattr("client.site.draw_overview", lambda *_: None)  # outlines: 1 MB a class in a scan of any size

    def prepare(path: Path, classes: int) -> Callable[[], object]:
        plan = _plan(classes)
        site = Site(load_site_config(path), plan, "run", 0 if message == "join" else 1)
        weights = dict(new_specialist(plan).state_dict())
        return site.join if message == "join" else lambda: site.evaluate(weights, final=True)

    assert _growth_mb(tmp_path, prepare) < 0.5 * (MANY - FEW) * MAP_MB
