"""A small clean site of real files to plant faults in."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from client.site_config import load_site_config
from intake.check.examine import DataCheck, check_site_data
from semisam_core.plan import Plan
from tests.conftest import write_nifti

SHAPE = (24, 22, 16)
MM = 2.0
CASES = 10


def patient(seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return an MR of a body in air with two organs, and their label: 1 the large one, 2 the small; (X, Y, Z)."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij"), -1)
    middle = np.array(SHAPE) / 2 + random.uniform(-1, 1, 3)
    body = (((grid - np.array(SHAPE) / 2) / (np.array(SHAPE) * 0.44)) ** 2).sum(-1) < 1
    label = np.zeros(SHAPE, np.uint8)
    label[np.linalg.norm(grid - middle, axis=-1) < 5] = 1
    label[np.linalg.norm(grid - middle - [6, 0, 0], axis=-1) < 2.5] = 2
    lump = np.linalg.norm(grid - middle - random.uniform(-6, 6, 3), axis=-1) < 4
    image = 4.0 + 60.0 * body + 40.0 * lump * body + 80.0 * (label == 1) + 120.0 * (label == 2)
    return np.abs(image + random.normal(0, 4, SHAPE)).astype(np.float32), label


@functools.cache
def _clean() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="clean-site-"))
    for k in range(CASES):
        image, label = patient(k)
        write_nifti(folder / "images" / f"case-{k}.nii.gz", image)
        write_nifti(folder / "labels" / f"case-{k}.nii.gz", label)
    return folder


def clean_data(folder: Path, cases: int = CASES) -> Path:
    """Copy the clean cases to a folder `data`; return it."""
    data = folder / "data"
    copytree(_clean(), data)
    for k in range(cases, CASES):
        for kind in ("images", "labels"):
            (data / kind / f"case-{k}.nii.gz").unlink()
    return data


def site_yaml(folder: Path, **data: Any) -> Path:
    """Write a site's YAML whose cases are all labeled but the last; return its path."""
    memory = data.pop("memory_gb", 4.0)
    content = {
        "version": 1,
        "site": "north",
        "data": {"images": "data/images", "labels": "data/labels", "labeled": "all", **data},
        "storage": {"folder": "storage", "memory_gb": memory},
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def checked(folder: Path, plan: Plan | None, **data: Any) -> DataCheck:
    """Check the site in a folder."""
    return check_site_data(load_site_config(site_yaml(folder, **data)), plan, lambda done, total: None)


def found(check: DataCheck, name: str) -> Sequence[tuple[str | None, str]]:
    """Return the case and sentence of each finding of one check."""
    return [(finding.case, finding.sentence) for finding in check.findings if finding.check == name]
