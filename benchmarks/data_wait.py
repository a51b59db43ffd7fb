"""How long a training step waits for its patches, with and without drawing them in the background.

    python benchmarks/data_wait.py --side 256 --scans 4 --steps 20

Writes a site of random scans into a temporary folder and trains one round on it twice in one process: with the patches
of the next steps drawn in the background, and drawn when they are needed. Prints the share of the time spent waiting.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml

from client.progress import ProgressLog
from client.scans import SiteScans
from client.site_config import SiteConfig, load_site_config
from semisam_core import training
from semisam_core.data.cases import Role
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.training import LocalRound, new_teacher, train_round


class AtOnce:
    """In place of `Prefetch`: makes each piece when it is asked for, and counts the time."""

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        self._make, self.waited_s = make, 0.0

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def next(self) -> Any:
        """Make the next piece."""
        began = time.perf_counter()
        piece = self._make()
        self.waited_s += time.perf_counter() - began
        return piece


def _plan(patch: int, steps: int) -> Plan:
    unet = {"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "residual_units": 1}
    return Plan.model_validate(
        {
            "version": 1,
            "task": {"name": "wait", "classes": [{"name": "blob", "value": 1}], "channels": ["ct"]},
            "data": {
                "spacing_mm": [1.0, 1.0, 1.0],
                "intensity": {"kind": "window", "lower": -200, "upper": 200},
                "patch": [patch] * 3,
            },
            "specialist": {"name": "unet", "arguments": unet},
            "training": {"rounds": 2, "steps_per_round": steps},
            "pseudo_labels": None,
            "seed": 0,
        },
        strict=False,
    )


def _site(folder: Path, side: int, scans: int, memory_gb: float) -> Path:
    random = np.random.default_rng(0)
    for k in range(scans):
        image = random.normal(0, 100, (side, side, side)).astype(np.int16)
        label = np.zeros(image.shape, np.uint8)
        label[side // 3 : side // 2, side // 3 : side // 2, side // 3 : side // 2] = 1
        for kind, volume in (("images", image), ("labels", label)):
            (folder / kind).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / kind / f"case-{k}.nii")
    content = {
        "version": 1,
        "site": "alpha",
        "data": {"images": "images", "labels": "labels", "labeled": ["case-0"]},
        "storage": {"folder": "storage", "memory_gb": memory_gb},
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _train(config: SiteConfig, plan: Plan) -> tuple[torch.Tensor, float, float]:
    """Train one round; return its weights, its seconds, and the seconds that it waited for patches."""
    scans = SiteScans(config, plan, ProgressLog(config.storage.folder / "progress.jsonl", 1))
    labeled, unlabeled = (
        [scans.training_loader(case) for case in scans.usable(role)] for role in (Role.LABELED, Role.UNLABELED)
    )
    specialist = new_specialist(plan)
    local = LocalRound(plan, specialist, new_teacher(specialist), labeled, unlabeled, 1, 0, torch.device("cpu"))
    began = time.perf_counter()
    result = train_round(local)
    seconds = time.perf_counter() - began
    return torch.cat([value.reshape(-1) for value in specialist.state_dict().values()]), seconds, result.waited_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure how long a training step waits for its patches.")
    for option, default in (("side", 256), ("scans", 4), ("steps", 20), ("patch", 96)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--memory-gb", type=float, default=0.1, help="small, so that scans are read from disk")
    chosen = parser.parse_args()
    found: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as name:
        plan = _plan(chosen.patch, chosen.steps)
        config = load_site_config(_site(Path(name), chosen.side, chosen.scans, chosen.memory_gb))
        SiteScans(config, plan, ProgressLog(Path(name) / "progress.jsonl", 0)).check()
        for how, prefetch in (("in the background", training.Prefetch), ("when they are needed", AtOnce)):
            training.Prefetch = prefetch  # type: ignore[misc,assignment]
            weights, seconds, waited = _train(config, plan)
            found.append(weights)
            print(f"patches drawn {how}: {waited / seconds:.1%} of {seconds:.1f} s waiting ({chosen.steps} steps)")
    print("weights are equal:", torch.equal(found[0], found[1]))
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
