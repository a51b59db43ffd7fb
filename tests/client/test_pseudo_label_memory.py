"""What making a pseudo-label takes is judged by the scan's header; what would take too much is not tried."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.labeling import Labeler
from client.progress import ProgressLog
from client.scans import SiteScans
from client.site_config import load_site_config
from semisam_core import components, scratch
from semisam_core.data.cases import Role
from semisam_core.plan import Plan
from semisam_core.prompting import depth
from semisam_core.pseudo_labels import views
from semisam_core.pseudo_labels.memory import pseudo_label_bytes
from semisam_core.sources.head_network import feature_head_of
from tests.client.test_class_memory import _taken_mb, _Tones
from tests.conftest import blob, tiny_plan, write_nifti, write_site
from tests.semisam_core.generalists.fake import register_fake

SMALL, LARGE = (48, 48, 48), (144, 136, 128)
IMAGE_GB = 24 * 24 * 16 * 4 / 1e9
THREE_PLANES = (
    "pseudo_labels.prompting.planes=[axial, coronal, sagittal]",
    "pseudo_labels.prompting.slice_step_mm=8.0",
    "pseudo_labels.prompting.margins_mm=[0.0, 3.0]",
    "pseudo_labels.gates.minimum_volume_ml=0.0",
    "pseudo_labels.gates.maximum_volume_ml=100000.0",
    "data.patch=[48, 48, 48]",
    "data.intensity={kind: window, lower: 0, upper: 100}",
)
EVIDENCE = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources={feature_head: {generalist: fake, steps_per_round: 1, batch: 1}, "
    "registration: {iterations: 1}, prototypes: {generalist: fake}}",
)
METHODS = {
    "semisam+": (),
    "combined": ("pseudo_labels.method=evidence", "pseudo_labels.sources.registration=null"),
    "evidence": EVIDENCE,
}


def _label(folder: Path, shape: tuple[int, int, int], plan: Plan) -> float:
    """Return the memory in MB that the pseudo-label of one scan takes, beside one labeled scan of the same shape."""
    for case in ("case-0", "case-1", "case-2"):
        size = shape if case != "case-2" else (16, 16, 16)
        for kind, volume in zip(("images", "labels"), blob(size), strict=True):
            write_nifti(folder / "data" / "alpha" / kind / f"{case}.nii", volume)
    config = load_site_config(
        write_site(folder, "alpha", storage={"memory_gb": pseudo_label_bytes(shape, shape, plan) / 1e9})
    )
    progress = ProgressLog(folder / "progress.jsonl", 1)
    scans, head = SiteScans(config, plan, progress), feature_head_of(plan)
    scans.check()
    scans._cache.clear()
    labeler = Labeler(config, plan, folder / "run", torch.device("cpu"), progress)

    def work() -> None:
        unlabeled, labeled = scans.keyed_pair_loaders(Role.UNLABELED), scans.pair_loaders(Role.LABELED)
        assert [bool(each.valid.all()) for each in labeler.labels(1, _Tones(1), unlabeled, labeled, head).values()] == [
            True
        ]

    return _taken_mb(work)


def _main(folder: Path, method: str) -> None:
    """Write to `taken.json` the memory that a large scan takes beyond a small one."""
    register_fake()
    torch.set_num_threads(1)
    for module in (scratch, views, depth):
        module.BLOCK = 1 << 15  # type: ignore[attr-defined]
    components._AT_ONCE = 1 << 15
    plan, taken = tiny_plan(*THREE_PLANES, *METHODS[method]), []
    for number, shape in enumerate((SMALL, SMALL, LARGE)):  # the first also loads libraries
        (folder / str(number)).mkdir()
        taken.append(_label(folder / str(number), shape, plan))
    (folder / "taken.json").write_text(json.dumps(taken[2] - taken[1]))


@pytest.mark.parametrize("method", METHODS)
def test_a_pseudo_label_takes_no_more_than_is_judged(tmp_path: Path, method: str) -> None:
    plan = tiny_plan(*THREE_PLANES, *METHODS[method])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, "-m", "tests.client.test_pseudo_label_memory", str(tmp_path), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    judged_mb = pseudo_label_bytes(LARGE, LARGE, plan) / 1e6
    assert 0.4 * judged_mb < json.loads((tmp_path / "taken.json").read_text()) < judged_mb


@pytest.mark.parametrize("changes", [(), EVIDENCE], ids=["semisam+", "evidence"])
def test_the_default_limit_takes_a_large_ct(changes: tuple[str, ...]) -> None:
    plan, shape = tiny_plan(*THREE_PLANES, *changes), (512, 512, 600)
    assert pseudo_label_bytes(shape, shape, plan) < 4e9
    coarse = tiny_plan(*THREE_PLANES, *changes, "pseudo_labels.spacing_mm=[4.0, 4.0, 4.0]")
    assert pseudo_label_bytes((256, 256, 300), shape, coarse) < pseudo_label_bytes(shape, shape, plan)


def test_more_channels_classes_and_planes(plan: Plan) -> None:
    shape = (100, 100, 50)
    alone = pseudo_label_bytes(shape, shape, plan)
    two = tiny_plan("task.channels=[a, b]")
    assert pseudo_label_bytes(shape, shape, two) == alone + 4 * math.prod(shape)
    assert pseudo_label_bytes(shape, shape, tiny_plan(*THREE_PLANES)) == alone


@pytest.mark.parametrize(
    ("maps", "changes", "counts"),
    [
        (4.26, (), {"labeled": 1, "unlabeled": 1}),
        (4.24, (), {"labeled": 1, "unlabeled": 0}),
        (4.24, ("pseudo_labels=null",), {"labeled": 1, "unlabeled": 1}),
        (4.26, EVIDENCE, {"labeled": 1, "unlabeled": 0}),
    ],
)
def test_a_scan_whose_pseudo_label_does_not_fit_is_quarantined(
    make_site: Callable[..., Path], tmp_path: Path, maps: float, changes: tuple[str, ...], counts: dict[str, int]
) -> None:
    config = load_site_config(make_site(storage={"memory_gb": maps * IMAGE_GB}))
    for _ in range(2):  # the second time by the verdict that was kept
        scans = SiteScans(config, tiny_plan(*changes), ProgressLog(tmp_path / "progress.jsonl", 1))
        assert {role: scans.counts()[role] for role in counts} == counts
        assert all("making a pseudo-label would take" in each.reason for each in scans.quarantined)


def test_a_verdict_by_one_method_does_not_hold_for_the_other(make_site: Callable[..., Path], tmp_path: Path) -> None:
    config = load_site_config(make_site(storage={"memory_gb": 5 * IMAGE_GB}))
    found = [
        SiteScans(config, tiny_plan(*changes), ProgressLog(tmp_path / "progress.jsonl", 1)).counts()["unlabeled"]
        for changes in (EVIDENCE, (), EVIDENCE)
    ]
    assert found == [0, 1, 0]


def test_a_labeled_scan_that_is_too_large_is_trained_on_but_not_shown_to_generalists(
    make_site: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_site_config(make_site(storage={"memory_gb": 3.9 * IMAGE_GB}))
    scans = SiteScans(config, tiny_plan(), ProgressLog(tmp_path / "progress.jsonl", 1))
    (case,) = scans.usable(Role.LABELED)
    assert scans.load(case) is not None
    assert scans.load_pair(case) is None


def test_cached_scans_leave_room_for_the_work_on_one(make_site: Callable[..., Path], tmp_path: Path) -> None:
    config = load_site_config(make_site(storage={"memory_gb": 5.85 * IMAGE_GB}))
    scans = SiteScans(config, tiny_plan(), ProgressLog(tmp_path / "progress.jsonl", 1))
    cases = scans.usable(*Role)
    assert len(scans._cache) == 3
    assert scans.load_pair(cases[0]) is not None
    assert list(scans._cache) == [cases[2].id, cases[0].id]


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
