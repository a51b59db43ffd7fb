"""What a round costs at a site of 10, 100 and 1,000 scans, with one scan of 512 x 512 x 600, and with 1 to 20 classes.

    python benchmarks/site_scale.py --scans 10,100,1000
    python benchmarks/site_scale.py --classes 1,5,20

For each number a site of small random scans is written, two of them labeled and two for validation. Then it works as a
deployed one does, each message in a process of its own: it joins, trains a round that makes all pseudo-labels, trains
one that makes none, trains that one with a warm index, and evaluates. Printed for each message: seconds, peak memory
beyond that of the imports, bytes read, and how many of the site's scan files were opened. Pseudo-labels come from a
generalist that calls bright voxels foreground, so that time is the site's own.

    python benchmarks/site_scale.py --large

measures only one pseudo-label of a scan of 512 x 512 x 600 by each method, in three planes and with two margins; the
site has one labeled scan of 256 x 256 x 200.

With `--classes`, the site has one labeled, one unlabeled and two validation scans of 256 x 256 x 200, and so many
classes. Then what is measured is joining, making one pseudo-label by each method (`evidence` with all sources), one
round of training the feature head, and evaluating. The teacher tells classes apart by their intensity.
"""

from __future__ import annotations

import argparse
import json
import math
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
from torch import Tensor, nn
from torch.nn import functional

from client.labeling import Labeler
from client.progress import ProgressLog
from client.scans import SiteScans
from client.site import Site
from client.site_config import load_site_config
from semisam_core.data.cases import Role
from semisam_core.generalists.base import GeneralistCard, PromptKind, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.registry import GeneralistSpec, register
from semisam_core.generalists.slices import Framing
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.memory import pseudo_label_bytes
from semisam_core.sources.head_network import feature_head_of

CARD = GeneralistCard("bright", frozenset({PromptKind.BOX_2D}), "none", "none", "this file", (), feature_channels=2)
FEATURES = 64  # along each side of a slice, as SAM has
STEPS = 20
MESSAGES = (("join", 0), ("train", 1), ("train", 2), ("train", 3), ("evaluate", 3))
MEANING = ("join", "train, makes all pseudo-labels", "train", "train again", "evaluate")
LARGE = (512, 512, 600)
PATCH = 64  # of a site with several classes
OF_CLASSES = (("join", ""), ("label", "semisam+"), ("label", "evidence"), ("head", "evidence"), ("evaluate", ""))
LOWEST, STEP, NOISE = -200, 380, 8  # intensity of background; from there to the brightest class; its range


class Bright:
    """Answers with a steep sigmoid of the scan's intensity inside each box."""

    card = CARD
    weights_sha256 = "0" * 64
    framing = Framing(FEATURES)

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
            probability[(*inside, box.index)] = torch.sigmoid(60 * (embeddings[box.index][inside] - 0.03))
        return Segmentation(probability, {box.index: 0.9 for box in prompts.boxes})

    def feature_map(self, embedding: Tensor) -> Tensor:
        """Return a slice's intensity and its complement."""
        framed = self.framing.pad(self.framing.frames(embedding[None]), 0.0)
        small = functional.adaptive_avg_pool2d(framed[None], FEATURES)[0, 0]
        return torch.stack([small, 1 - small])


class Tones(nn.Module):
    """A teacher that tells classes apart by their intensity."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("tones", torch.arange(1 + classes) * STEP / 400 / classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (B, 1 + K, H, W, D)."""
        tones: Tensor = self.tones
        return -((patches - tones.view(1, -1, 1, 1, 1)) ** 2) * (10 * len(tones)) ** 2


def _evidence() -> dict[str, Any]:
    prototypes = {"foreground_prototypes": 2, "background_prototypes": 2}
    return {
        "feature_head": {"generalist": "bright", "steps_per_round": 2, "batch": 2},
        "registration": {"iterations": 5},
        "prototypes": {"generalist": "bright", **prototypes},
    }


def _plan(patch: int, classes: int = 1, method: str = "semisam+", planes: int = 1) -> Plan:
    named = [{"name": f"class-{k}", "value": k} for k in range(1, 1 + classes)]
    return Plan.model_validate(
        {
            "version": 1,
            "task": {"name": "scale", "classes": named, "channels": ["ct"]},
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
                "method": method,
                "sources": _evidence() if method == "evidence" else {},
                "prompting": {
                    "planes": ["axial", "coronal", "sagittal"][:planes],
                    "slice_step_mm": 4.0,
                    "margins_mm": [0.0, 3.0] if planes > 1 else [0.0],
                },
                "gates": {"minimum_volume_ml": 0.0, "maximum_volume_ml": 1e6, "minimum_agreement": 0.0},
            },
            "seed": 0,
        },
        strict=False,
    )


def _write(folder: Path, name: str, shape: tuple[int, int, int], seed: int, classes: int) -> None:
    """Write a scan with a cuboid of each class, each of its own intensity, and its label."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    cells = math.ceil(classes ** (1 / 3))
    for k in range(classes):
        corner = (k % cells, k // cells % cells, k // cells**2)
        box = (
            slice(round((at + 1 / 4) * side / cells), round((at + 3 / 4) * side / cells))
            for at, side in zip(corner, shape, strict=True)
        )
        label[tuple(box)] = k + 1
    image = random.integers(LOWEST, LOWEST + NOISE, shape, np.int16) + (STEP * label.astype(np.int32) // classes)
    nib.save(nib.Nifti1Image(image.astype(np.int16), np.eye(4)), folder / "images" / f"{name}.nii")
    nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"{name}.nii")


def _site(
    folder: Path, scans: int, shape: tuple[int, int, int], memory_gb: float, labeled: int = 2, classes: int = 1
) -> Path:
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for k in track(range(scans), f"write {scans} scans"):
        _write(folder, f"case-{k:04}", shape, k, classes)
    content = {
        "version": 1,
        "site": "alpha",
        "data": {
            "images": "images",
            "labels": "labels",
            "labeled": ["case-0000", "case-0001"][: min(labeled, max(1, scans - 2))],
            "validation": ["case-0002", "case-0003"] if scans > 3 else [],
        },
        "generalists": {"bright": {"weights": "packaged"}},
        "storage": {"folder": "storage", "memory_gb": memory_gb},
        "threads": 1,
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _register() -> None:
    register(GeneralistSpec(CARD, lambda device, weights, sha256: Bright(), packaged=True))


def _message(path: Path, patch: int, kind: str, number: int, classes: int, method: str) -> dict[str, float]:
    """Work on one message in this process; return what it cost."""
    opened: set[str] = set()
    data = str(path.parent / "images"), str(path.parent / "labels")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(data):
            opened.add(str(arguments[0]))

    _register()
    plan = _plan(patch, classes, method, 3 if kind == "large" else 1)
    weights = new_specialist(plan).state_dict()
    before_gb, read = _peak_gb(), _bytes_read()
    sys.addaudithook(watch)
    began, worked = time.perf_counter(), time.process_time()
    accepted = 0
    if kind in ("label", "head", "large"):
        accepted = _label(path, plan, kind)
    else:
        site = Site(load_site_config(path), plan, "run", number)
        if kind == "join":
            site.join()
        elif kind == "train":
            site.train(weights)
        else:
            site.evaluate(weights, final=kind == "draw")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
        "memory_gb": _peak_gb() - before_gb,
        "read_mb": (_bytes_read() - read) / 1e6,
        "scan_files": len(opened),
        "accepted": accepted,
    }


def _label(path: Path, plan: Plan, kind: str) -> int:
    """Make the site's pseudo-labels, or train its feature head; return how many classes were accepted."""
    config = load_site_config(path)
    torch.set_num_threads(config.threads or 1)
    progress = ProgressLog(path.parent / "progress.jsonl", 1)
    scans, head = SiteScans(config, plan, progress), feature_head_of(plan)
    labeler = Labeler(config, plan, path.parent / "run", torch.device("cpu"), progress)
    labeled = scans.pair_loaders(Role.LABELED)
    if kind == "head" and head is not None:
        return labeler.train_head(head, labeled, 1, 0)
    unlabeled = scans.keyed_pair_loaders(Role.UNLABELED)
    labels = labeler.labels(1, Tones(len(plan.task.classes)), unlabeled, labeled, head)
    return sum(int(label.valid.sum()) for label in labels.values())


def _peak_gb() -> float:
    # Not ru_maxrss, which begins at the parent's: it has written the scans.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _measure(console: Console, scans: int, shape: tuple[int, int, int], patch: int, memory_gb: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = _site(Path(name), scans, shape, memory_gb)
        console.print(f"\n{scans} scans of {' x '.join(map(str, shape))}, storage.memory_gb {memory_gb:g}")
        console.print(f"{'message':>32} {'seconds':>8} {'memory GB':>10} {'read MB':>9} {'scan files opened':>18}")
        for meaning, (kind, number) in zip(MEANING, MESSAGES, strict=True):
            found = _in_child(path, patch, kind, number)
            console.print(
                f"{meaning:>32} {found['seconds']:>8.1f} {found['memory_gb']:>10.2f} {found['read_mb']:>9.1f} "
                f"{found['scan_files']:>18}"
            )


def _measure_classes(console: Console, classes: Sequence[int], shape: tuple[int, int, int]) -> None:
    console.print(f"\nscans of {' x '.join(map(str, shape))}, windows of {PATCH}")
    console.print(f"{'message':>20} {'classes':>8} {'CPU s':>8} {'memory GB':>10} {'accepted':>9}")
    for count in classes:
        with tempfile.TemporaryDirectory() as name:
            path = _site(Path(name), 4, shape, 1.0, 1, count)
            for kind, method in OF_CLASSES:
                found = _in_child(path, PATCH, kind, 1, count, method or "semisam+")
                console.print(
                    f"{f'{kind} {method}':>20} {count:>8} {found['cpu_seconds']:>8.1f} {found['memory_gb']:>10.2f} "
                    f"{found['accepted']:>9}"
                )


def _measure_large(console: Console, memory_gb: float) -> None:
    _register()
    console.print(f"\none pseudo-label of {' x '.join(map(str, LARGE))}, three planes, two margins, one class")
    console.print(f"{'method':>20} {'seconds':>8} {'CPU s':>8} {'memory GB':>10} {'judged GB':>10} {'accepted':>9}")
    with tempfile.TemporaryDirectory() as name:
        path = _site(Path(name), 1, (256, 256, 200), memory_gb)
        _write(Path(name), "case-0001", LARGE, 1, 1)
        path.write_text(path.read_text().replace("- case-0001\n", ""))
        for method in ("semisam+", "evidence"):
            found = _in_child(path, PATCH, "large", 1, 1, method)
            judged = pseudo_label_bytes(LARGE, LARGE, _plan(PATCH, 1, method, 3)) / 1e9
            console.print(
                f"{method:>20} {found['seconds']:>8.1f} {found['cpu_seconds']:>8.1f} {found['memory_gb']:>10.2f} "
                f"{judged:>10.2f} {found['accepted']:>9}"
            )


def _in_child(path: Path, patch: int, kind: str, number: int, classes: int = 1, method: str = "semisam+") -> Any:
    message = [str(path), str(patch), kind, str(number), str(classes), method]
    command = [sys.executable, __file__, "--message", *message]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", default="10,100,1000", help="numbers of scans")
    parser.add_argument("--classes", help="numbers of classes; measures these instead of numbers of scans")
    parser.add_argument("--size", default="256,256,200", help="with --classes: voxels of a scan")
    parser.add_argument("--side", type=int, default=32, help="voxels along each axis of a scan")
    parser.add_argument("--memory-gb", type=float, default=0.01, help="the site's limit: a few of its scans")
    parser.add_argument("--no-large", action="store_true", help=f"leave out the scan of {LARGE}")
    parser.add_argument("--large", action="store_true", help=f"measure only a pseudo-label of {LARGE} by each method")
    parser.add_argument("--message", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.message:
        path, patch, kind, number, classes, method = given.message
        print(json.dumps(_message(Path(path), int(patch), kind, int(number), int(classes), method)))
        return
    console = Console(width=120)
    if given.large:
        _measure_large(console, 4.0)
        return
    if given.classes:
        height, width, depth = (int(each) for each in given.size.split(","))
        _measure_classes(console, [int(each) for each in given.classes.split(",")], (height, width, depth))
        return
    for scans in (int(each) for each in given.scans.split(",")):
        _measure(console, scans, (given.side,) * 3, 16, given.memory_gb)
    if not given.no_large:
        _measure(console, 2, LARGE, 64, 4.0)


if __name__ == "__main__":
    main()
