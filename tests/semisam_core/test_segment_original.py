"""Segmenting a large scan in bounded memory: voxel by voxel what the whole probabilities give."""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from scipy.spatial.transform import Rotation
from torch import Tensor

from semisam_core import inference
from semisam_core.data import resampling
from semisam_core.data.geometry import Geometry
from semisam_core.data.resampling import GridChange, resample_blocks
from semisam_core.data.scans import Scan, to_original
from semisam_core.inference import new_specialist, predict, segment_original, segmentation
from semisam_core.plan import Plan
from semisam_core.row_window import RowWindow
from semisam_core.scratch import Scratch
from tests.conftest import tiny_plan

CPU = torch.device("cpu")
CLASSES = "task.classes=[{name: a, value: 1, connected: true}, {name: b, value: 2}, {name: c, value: 3}]"
SHAPES = st.tuples(st.integers(4, 40), st.integers(4, 26), st.integers(4, 18))


def _affine(seed: int, spacing: tuple[float, ...], oblique: bool) -> Tensor:
    """Return an affine with permuted and flipped axes, and rotated by a few degrees if oblique."""
    random = np.random.default_rng(seed)
    axes = np.eye(3)[random.permutation(3)] * random.choice([-1, 1], 3)
    turn = Rotation.from_rotvec(random.normal(0, 0.2, 3) * oblique).as_matrix()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ axes @ np.diag(spacing), random.normal(0, 5, 3)
    return torch.from_numpy(affine)


def _scan(shape: tuple[int, int, int], seed: int, oblique: bool, same_grid: bool) -> Scan:
    random = np.random.default_rng(seed)
    grid = Geometry(shape, torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)))
    sides = [int(side) for side in random.integers(4, 40, 3)]
    original = Geometry((sides[0], sides[1], sides[2]), _affine(seed, tuple(random.uniform(0.7, 3, 3)), oblique))
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
    return Scan("x", image, None, grid, grid if same_grid else original)


def _sharp(plan: Plan) -> torch.nn.Module:
    """Return a specialist whose classes change from voxel to voxel, so that mistakes show."""
    network = new_specialist(plan)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return network


@settings(deadline=None, max_examples=40)
@given(
    shape=SHAPES,
    seed=st.integers(0, 999),
    oblique=st.booleans(),
    same_grid=st.booleans(),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_it_is_the_segmentation_of_the_whole_probabilities(
    shape: tuple[int, int, int], seed: int, oblique: bool, same_grid: bool, overlap: float
) -> None:
    plan = tiny_plan(CLASSES, f"evaluation.overlap={overlap}")
    scan, network = _scan(shape, seed, oblique, same_grid), _sharp(plan)
    expected = segmentation(to_original(predict(network, scan.image, plan, CPU), scan), plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "BLOCK_BYTES", 30_000)  # several blocks
        found = segment_original(network, scan, plan, CPU)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 999), overlap=st.sampled_from([0.0, 0.25, 0.5]))
def test_its_probabilities_are_equal_bit_by_bit(
    shape: tuple[int, int, int], seed: int, overlap: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = tiny_plan(CLASSES, f"evaluation.overlap={overlap}")
    scan, network = _scan(shape, seed, False, True), _sharp(plan).eval()
    with torch.inference_mode():
        rolling = inference.SlidingProbabilities(network, scan.image, 4, plan.data.patch, overlap, CPU)
        rolling.advance(shape[0])
    probability = predict(network, scan.image, plan, CPU)
    assert torch.equal(rolling.volume, probability)
    scratch = Scratch(tmp_path_factory.mktemp("scratch"))
    assert torch.equal(predict(network, scan.image, plan, CPU, scratch=scratch), probability)
    on_disk, in_memory = (segment_original(network, scan, plan, CPU, scratch=each) for each in (scratch, None))
    assert torch.equal(on_disk, in_memory)


@settings(deadline=None, max_examples=40)
@given(source=SHAPES, target=SHAPES, seed=st.integers(0, 999), mode=st.sampled_from(["bilinear", "nearest"]))
def test_blocks_are_resampled_as_monai_resamples_the_whole(
    source: tuple[int, int, int], target: tuple[int, int, int], seed: int, mode: str
) -> None:
    grids = [Geometry(side, _affine(seed + k, (1.0, 1.3, 2.1), k == 1)) for k, side in enumerate((source, target))]
    maps = torch.randn((2, *source), generator=torch.Generator().manual_seed(seed))
    whole = SpatialResample(mode=mode, padding_mode="border", dtype=torch.float32)(
        MetaTensor(maps, affine=grids[0].affine), dst_affine=grids[1].affine, spatial_size=target
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "BLOCK_BYTES", 30_000)
        assert torch.equal(resample_blocks(maps, *grids, mode), whole.as_tensor())
        change = GridChange(*grids)
        for block in change.blocks(change.axis_of_rows, 8):
            first, end = change.source_rows(block)
            only = torch.full_like(maps, torch.nan)
            only[:, first:end] = maps[:, first:end]
            assert torch.equal(change.sample(only, block), change.sample(maps, block))


def test_the_networks_mode_comes_back_and_progress_is_reported() -> None:
    plan = tiny_plan(CLASSES)
    network, seen = new_specialist(plan).train(), []
    scan = _scan((20, 20, 10), 0, False, False)
    segment_original(network, scan, plan, CPU, progress=lambda done, total: seen.append((done, total)))
    assert network.training
    assert seen[-1][0] == seen[-1][1] in scan.original.shape


def test_released_rows_take_no_memory() -> None:
    window = RowWindow(4, (64, 256, 256))  # 67 MB
    before, peak = _resident_mb(), 0.0
    for row in range(64):
        window.volume[:, row] = 1.0
        window.release(row)
        peak = max(peak, _resident_mb() - before)
    assert peak < 10
    assert bool((window.volume[:, 63] == 1).all())


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


CHILD = """
import resource, torch
torch.set_num_threads(1)
from semisam_core.data import resampling
from semisam_core.inference import segment_original
from tests.semisam_core.test_segment_original import large_case
resampling.BLOCK_BYTES = 2_000_000
scan, network, plan = large_case()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
segment_original(network, scan, plan, torch.device("cpu"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class Levels(torch.nn.Module):
    """A fixed specialist of 20 channels that costs nothing."""

    def forward(self, patches: Tensor) -> Tensor:
        return torch.cat([patches * k for k in range(20)], 1)


def large_case() -> tuple[Scan, torch.nn.Module, Plan]:
    """Return a scan whose probabilities of 19 classes take 42 MB on the plan's grid and 84 MB on its own."""
    classes = ", ".join(f"{{name: c{k}, value: {k}}}" for k in range(1, 20))
    plan = tiny_plan(
        "pseudo_labels=null", f"task.classes=[{classes}]", "data.patch=[16, 32, 32]", "evaluation.overlap=0.25"
    )
    grid = Geometry((64, 96, 86), torch.eye(4, dtype=torch.float64))
    affine = torch.diag(torch.tensor([0.5, 1.0, 1.0, 1.0], dtype=torch.float64))
    image = torch.rand((1, *grid.shape), generator=torch.Generator().manual_seed(0))
    return Scan("x", image, None, grid, Geometry((128, 96, 86), affine)), Levels(), plan


def test_memory_is_a_fraction_of_the_probabilities() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=120)
    assert int(child.stdout) / 1e3 < 0.4 * 84
