"""What a round costs at a site of 10, 100 and 1,000 scans, and with one scan of 512 x 512 x 600.

    python benchmarks/site_scale.py --scans 10,100,1000

For each number a site of small random scans is written, two of them labeled and two for validation. Then it works as a
deployed one does, each message in a process of its own: it joins, trains a round that makes all pseudo-labels, trains
one that makes none, trains that one with a warm index, and evaluates. Printed for each message: seconds, peak memory
beyond that of the imports, bytes read, and how many of the site's scan files were opened. Pseudo-labels come from a
generalist that calls bright voxels foreground, so that time is the site's own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import track
from torch import Tensor

from client.site import Site
from client.site_config import load_site_config
from semisam_core.contract import update_spec
from semisam_core.generalists.base import GeneralistCard, PromptKind, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.registry import GeneralistSpec, register
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan

CARD = GeneralistCard("bright", frozenset({PromptKind.BOX_2D}), "none", "none", "this file", (), 0)
STEPS = 20
MESSAGES = (("join", 0), ("train", 1), ("train", 2), ("train", 3), ("evaluate", 3))
MEANING = ("join", "train, makes all pseudo-labels", "train", "train again", "evaluate")
LARGE = (512, 512, 600)


class Bright:
    """Answers with a steep sigmoid of the scan's intensity inside each box."""

    card = CARD
    weights_sha256 = "0" * 64

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the slices that have a box."""
        return tuple(sorted({box.index for box in prompts.boxes}))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Return the slices themselves."""
        return {unit: volume[:, :, unit].clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Answer one prompt set."""
        probability = torch.zeros(grid.shape)
        for box in prompts.boxes:
            top, left, bottom, right = (round(bound) for bound in box.bounds)
            inside = (slice(top, bottom + 1), slice(left, right + 1))
            probability[(*inside, box.index)] = torch.sigmoid(6 * embeddings[box.index][inside])
        return Segmentation(probability, {box.index: 0.9 for box in prompts.boxes})


def _plan(patch: int) -> Plan:
    return Plan.model_validate(
        {
            "version": 1,
            "task": {"name": "scale", "classes": [{"name": "blob", "value": 1}], "channels": ["ct"]},
            "data": {
                "spacing_mm": [1.0, 1.0, 1.0],
                "intensity": {"kind": "window", "lower": -200, "upper": 200},
                "patch": [patch] * 3,
            },
            "specialist": {"name": "unet", "arguments": {"channels": [8, 16], "strides": [2], "residual_units": 1}},
            "training": {"rounds": 20, "steps_per_round": STEPS},
            "pseudo_labels": {
                "generalists": ["bright"],
                "first_round": 1,
                "refresh_every": 20,
                "prompting": {"planes": ["axial"], "slice_step_mm": 4.0, "margins_mm": [0.0]},
                "gates": {"minimum_volume_ml": 0.0, "maximum_volume_ml": 1e6, "minimum_agreement": 0.0},
            },
            "seed": 0,
        },
        strict=False,
    )


def _write(folder: Path, name: str, shape: tuple[int, int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(side // 3, side // 2) for side in shape)] = 1
    image = random.integers(-100, 0, shape, np.int16) + 150 * label.astype(np.int16)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / f"{name}.nii")
    nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"{name}.nii")


def _site(folder: Path, scans: int, shape: tuple[int, int, int], memory_gb: float) -> Path:
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for k in track(range(scans), f"write {scans} scans"):
        _write(folder, f"case-{k:04}", shape, k)
    content = {
        "version": 1,
        "site": "alpha",
        "data": {
            "images": "images",
            "labels": "labels",
            "labeled": ["case-0000", "case-0001"][: max(1, scans - 2)],
            "validation": ["case-0002", "case-0003"] if scans > 3 else [],
        },
        "generalists": {"bright": {"weights": "packaged"}},
        "storage": {"folder": "storage", "memory_gb": memory_gb},
        "threads": 1,
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _message(path: Path, patch: int, kind: str, number: int) -> dict[str, float]:
    """Work on one message in this process; return what it cost."""
    opened: set[str] = set()
    data = str(path.parent / "images"), str(path.parent / "labels")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(data):
            opened.add(str(arguments[0]))

    register(GeneralistSpec(CARD, lambda device, weights, sha256: Bright(), packaged=True))
    plan = _plan(patch)
    weights = new_specialist(plan).state_dict()
    assert weights.keys() == update_spec(plan).keys()
    before_gb, read = _peak_gb(), _bytes_read()
    sys.addaudithook(watch)
    began = time.perf_counter()
    site = Site(load_site_config(path), plan, "run", number)
    if kind == "join":
        site.join()
    elif kind == "train":
        site.train(weights)
    else:
        site.evaluate(weights, final=False)
    return {
        "seconds": time.perf_counter() - began,
        "memory_gb": _peak_gb() - before_gb,
        "read_mb": (_bytes_read() - read) / 1e6,
        "scan_files": len(opened),
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _measure(console: Console, scans: int, shape: tuple[int, int, int], patch: int, memory_gb: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = _site(Path(name), scans, shape, memory_gb)
        console.print(f"\n{scans} scans of {' x '.join(map(str, shape))}, storage.memory_gb {memory_gb:g}")
        console.print(f"{'message':>32} {'seconds':>8} {'memory GB':>10} {'read MB':>9} {'scan files opened':>18}")
        for meaning, (kind, number) in zip(MEANING, MESSAGES, strict=True):
            command = [sys.executable, __file__, "--message", str(path), str(patch), kind, str(number)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            console.print(
                f"{meaning:>32} {found['seconds']:>8.1f} {found['memory_gb']:>10.2f} {found['read_mb']:>9.1f} "
                f"{found['scan_files']:>18}"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", default="10,100,1000", help="numbers of scans")
    parser.add_argument("--side", type=int, default=32, help="voxels along each axis of a scan")
    parser.add_argument("--memory-gb", type=float, default=0.01, help="the site's limit: a few of its scans")
    parser.add_argument("--no-large", action="store_true", help=f"leave out the scan of {LARGE}")
    parser.add_argument("--message", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.message:
        path, patch, kind, number = given.message
        print(json.dumps(_message(Path(path), int(patch), kind, int(number))))
        return
    console = Console(width=120)
    for scans in (int(each) for each in given.scans.split(",")):
        _measure(console, scans, (given.side,) * 3, 16, given.memory_gb)
    if not given.no_large:
        _measure(console, 2, LARGE, 64, 1.0)


if __name__ == "__main__":
    main()
