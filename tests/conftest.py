"""What every room's tests share: a tiny plan, ordinary NIfTI files, and one thread a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from semisam_core.configuration import override
from semisam_core.plan import Plan
from tests.semisam_core.generalists.fake import register_fake

LEFT_ATRIUM = Path(__file__).resolve().parents[2] / "shared" / "data" / "la"

TINY_PLAN: dict[str, Any] = {
    "version": 1,
    "task": {"name": "tiny", "classes": [{"name": "blob", "value": 1}], "channels": ["mr"]},
    "data": {
        "spacing_mm": [2.0, 2.0, 2.0],
        "intensity": {"kind": "percentiles", "lower": 0.5, "upper": 99.5},
        "patch": [16, 16, 8],
    },
    "specialist": {"name": "unet", "arguments": {"channels": [4, 8], "strides": [2], "residual_units": 0}},
    "training": {"rounds": 2, "steps_per_round": 2},
    "pseudo_labels": {
        "generalists": ["fake"],
        "first_round": 1,
        "prompting": {"planes": ["axial"], "slice_step_mm": 0.0, "margins_mm": [-2.0, 1.5, 5.0]},
        "gates": {"minimum_volume_ml": 0.05, "maximum_volume_ml": 1000.0, "minimum_agreement": 0.0},
    },
    "aggregation": {"join_deadline_s": 30, "round_deadline_s": 120},
    "evaluation": {"every_rounds": 1},
    "seed": 0,
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # before the fixtures of any module compute what is compared bit by bit


@pytest.fixture(autouse=True)
def _one_thread_again(_one_thread: None) -> None:
    torch.set_num_threads(1)  # a test may have set others


@pytest.fixture(autouse=True, scope="session")
def _fake_generalist() -> None:
    register_fake()


def tiny_plan(*assignments: str) -> Plan:
    """Return the smallest plan that uses everything, changed by dotted assignments."""
    return Plan.model_validate_json(_json(override(TINY_PLAN, list(assignments))))


@pytest.fixture
def plan() -> Plan:
    return tiny_plan()


def _json(content: dict[str, Any]) -> str:
    import json

    return json.dumps(content)


def blob(shape: tuple[int, int, int] = (24, 24, 16), seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a noisy scan with one bright ball, and the ball's label; (H, W, D)."""
    random = np.random.default_rng(seed)
    centre = np.array(shape) / 2 + random.uniform(-2, 2, 3)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in shape), indexing="ij"), -1)
    label = (np.linalg.norm(grid - centre, axis=-1) < min(shape) / 3.2).astype(np.uint8)
    image = 100 * label + random.normal(0, 10, shape)
    return image.astype(np.float32), label


def write_nifti(path: Path, volume: NDArray[Any], affine: NDArray[Any] | None = None) -> Path:
    """Write a volume as NIfTI, 2 mm voxels unless an affine says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


def write_blobs(folder: Path, count: int, first_seed: int = 0, shape: tuple[int, int, int] = (24, 24, 16)) -> list[str]:
    """Write cases `case-0`, `case-1`, ... with labels; return their ids."""
    names = [f"case-{k}" for k in range(count)]
    for k, name in enumerate(names):
        image, label = blob(shape, first_seed + k)
        write_nifti(folder / "images" / f"{name}.nii.gz", image)
        write_nifti(folder / "labels" / f"{name}.nii.gz", label)
    return names


def balls(seed: int = 0, shape: tuple[int, int, int] = (24, 24, 16)) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a noisy scan with a large ball (1), a ball that touches it (2) and a small one apart (3), and its label.

    They differ in brightness: 100, 200, 300 on 0.
    """
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in shape), indexing="ij"), -1)
    shift = random.uniform(-1, 1, 3)
    label = np.zeros(shape, np.uint8)
    for k, (centre, radius) in enumerate((((9, 8, 8), 5.0), ((9, 17, 8), 4.2), ((19, 6, 7), 2.2)), start=1):
        label[np.linalg.norm(grid - centre - shift, axis=-1) < radius] = k
    image = 100.0 * label + random.normal(0, 10, shape)
    return image.astype(np.float32), label


def write_balls(folder: Path, count: int, first_seed: int = 0, marked: tuple[int, ...] = (1, 2, 3)) -> None:
    """Write cases `case-0`, `case-1`, ... of three balls whose labels mark some of them."""
    for k in range(count):
        image, label = balls(first_seed + k)
        write_nifti(folder / "images" / f"case-{k}.nii.gz", image)
        write_nifti(folder / "labels" / f"case-{k}.nii.gz", np.where(np.isin(label, marked), label, 0).astype(np.uint8))


def write_site(folder: Path, name: str, **changes: Any) -> Path:
    """Write `<folder>/sites/<name>.yaml` for data in `<folder>/data/<name>`; return its path."""
    content: dict[str, Any] = {
        "version": 1,
        "site": name,
        "data": {
            "images": str(folder / "data" / name / "images"),
            "labels": str(folder / "data" / name / "labels"),
            "labeled": ["case-0"],
            "validation": ["case-2"],
        },
        "generalists": {"fake": {"weights": "packaged"}},
        "device": "cpu",
        "threads": 1,
        "storage": {"folder": str(folder / "storage" / name)},
        "egress": {"numbers": "exact"},  # generated data; rounding has tests of its own
    }
    for key, value in changes.items():
        if isinstance(value, dict) and key != "generalists":
            content[key] = {**content.get(key, {}), **value}
        else:
            content[key] = value
    path = folder / "sites" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a site with three cases (labeled, unlabeled, validation) and its YAML."""

    def make(
        name: str = "alpha",
        cases: int = 3,
        first_seed: int = 0,
        shape: tuple[int, int, int] = (24, 24, 16),
        **changes: Any,
    ) -> Path:
        write_blobs(tmp_path / "data" / name, cases, first_seed, shape)
        return write_site(tmp_path, name, **changes)

    return make


@pytest.fixture(scope="session")
def left_atrium() -> Path:
    """Return the folder of real left-atrium scans, or skip."""
    if not (LEFT_ATRIUM / "sites.csv").exists():
        pytest.skip(f"the real left-atrium scans are not at {LEFT_ATRIUM}")
    return LEFT_ATRIUM
