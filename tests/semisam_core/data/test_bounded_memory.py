"""Preparing a scan in bounded memory gives the scan that MONAI's transforms give, bit by bit."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import (
    NormalizeIntensity,
    Orientation,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
)
from scipy.spatial.transform import Rotation

from semisam_core.data import resampling, scans
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import Scan, load_scan
from semisam_core.plan import Plan
from tests.conftest import tiny_plan

WINDOW = "data.intensity={kind: window, lower: -30, upper: 90}"
GRIDS = ("data.spacing_mm=[2.0, 2.0, 2.0]", "data.spacing_mm=[1.1, 0.9, 2.7]")


def _write(folder: Path, seed: int, scaled: bool, stored: type) -> Case:
    random = np.random.default_rng(seed)
    shape = tuple(int(side) for side in random.integers(5, 26, 3))
    turn = Rotation.from_rotvec(random.normal(0, 0.2, 3) * (seed % 3 == 0)).as_matrix()
    affine = np.eye(4)
    axes = np.eye(3)[random.permutation(3)] * random.choice([-1, 1], 3)
    affine[:3, :3], affine[:3, 3] = turn @ axes @ np.diag(random.uniform(1.0, 2.5, 3)), random.normal(0, 30, 3)
    image = nib.Nifti1Image((50 * random.normal(size=shape)).astype(stored), affine)
    if scaled:
        image.header.set_slope_inter(0.7301, -3.3)
    label = nib.Nifti1Image((random.random(shape) < 0.3).astype(np.uint8), affine)
    for kind, volume in (("image", image), ("label", label)):
        nib.save(volume, folder / f"{kind}.nii.gz")
    return Case("x", (folder / "image.nii.gz",), folder / "label.nii.gz", Role.LABELED)


def _by_monai(case: Case, plan: Plan) -> tuple[MetaTensor, torch.Tensor]:
    """Return image and label as MONAI's transforms make them, all at once."""

    def onto_grid(values: torch.Tensor, mode: str) -> MetaTensor:
        volume = MetaTensor(values, affine=torch.from_numpy(nib.load(case.images[0]).affine))
        oriented = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(volume)
        moved: MetaTensor = Spacing(pixdim=plan.data.spacing_mm, mode=mode, padding_mode="border", dtype=torch.float32)(
            oriented
        )
        return moved

    assert case.label is not None
    read = [np.asarray(nib.load(path).dataobj, dtype=np.float32) for path in (case.images[0], case.label)]
    image, label = (
        onto_grid(torch.from_numpy(read[0])[None], "bilinear"),
        onto_grid(torch.from_numpy(read[1])[None], "nearest"),
    )
    low, high = plan.data.intensity.lower, plan.data.intensity.upper
    values = image.as_tensor()
    if plan.data.intensity.kind == "window":
        values = ScaleIntensityRange(low, high, b_min=0.0, b_max=1.0, clip=True)(values)
    else:
        values = torch.stack([ScaleIntensityRangePercentiles(low, high, 0.0, 1.0, clip=True)(c) for c in values])
        values = NormalizeIntensity(channel_wise=True)(values)
    return MetaTensor(values, affine=image.affine), label.as_tensor()[0].round().to(torch.uint8)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9999),
    scaled=st.booleans(),
    stored=st.sampled_from([np.int16, np.uint8, np.float32, np.float64]),
    changes=st.tuples(st.sampled_from(GRIDS), st.sampled_from(["seed=0", WINDOW])),
)
def test_a_scan_is_prepared_as_monai_prepares_it(
    seed: int, scaled: bool, stored: type, changes: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    case, plan = _write(tmp_path_factory.mktemp("scan"), seed, scaled, stored), tiny_plan(*changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "BLOCK_BYTES", 20_000)
        patch.setattr(scans, "SLAB_ROWS", 3)
        scan = load_scan(case, plan)
    image, label = _by_monai(case, plan)
    assert torch.equal(scan.image, image.as_tensor())
    assert scan.label is not None
    assert torch.equal(scan.label, label)
    assert torch.equal(scan.grid.affine, image.affine.double())


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


@pytest.mark.parametrize("scaled", [False, True])
def test_peak_memory_is_three_times_the_image(tmp_path: Path, scaled: bool) -> None:
    shape, affine = (160, 160, 200), np.diag([-1.0, -1.0, 1.5, 1.0])  # LPS, as CT often is: 20 MB as float32
    image = nib.Nifti1Image(np.zeros(shape, np.int16), affine)
    image.dataobj[40:90, 40:90, 50:150] = 100
    if scaled:
        image.header.set_slope_inter(0.5, -100.0)
    label = np.zeros(shape, np.uint8)
    label[50:60, 50:60, 60:70] = 1
    for kind, volume in (("image", image), ("label", nib.Nifti1Image(label, affine))):
        nib.save(volume, tmp_path / f"{kind}.nii")
    case = Case("x", (tmp_path / "image.nii",), tmp_path / "label.nii", Role.LABELED)
    plan = tiny_plan("data.spacing_mm=[1.05, 1.05, 1.55]")
    del image, label, volume
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "BLOCK_BYTES", 1_000_000)
        for _ in range(2):  # the first also loads libraries
            Path("/proc/self/clear_refs").write_text("5")
            before = _peak_mb()
            scan: Scan = load_scan(case, plan)
            sizes.append((_peak_mb() - before, scan.image.nbytes / 1e6))
            del scan
    original_mb = 4e-6 * float(np.prod(shape))
    assert sizes[1][0] < 3 * original_mb
