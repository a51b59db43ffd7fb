"""What `semisam predict` costs beside the network: time against MONAI's sliding window, and a large scan's memory.

    python benchmarks/predict_overhead.py --scan la_001.nii.gz --plan site_configs/left-atrium/plan.yaml
    python benchmarks/predict_overhead.py --large 512 512 600 --plan site_configs/left-atrium/plan.yaml

Weights do not matter for time or memory, so the plan's initial specialist is used.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference

from intake.files import read_volume
from release.memory import needed_gb
from release.model import TrainedModel
from release.outputs import write_nifti
from release.prediction import Predictor
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import prepare_image, to_original
from semisam_core.inference import new_specialist, segment_original, segmentation
from semisam_core.inference import predict as infer
from semisam_core.plan import Plan, load_plan
from semisam_core.sliding_window import SlidingProbabilities

CPU = torch.device("cpu")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--scan", type=Path, help="a real scan, for time")
    parser.add_argument("--large", type=int, nargs=3, help="shape of a made scan of 0.7 mm, for memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--uncertainty", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = load_plan(arguments.plan)
    if arguments.scan:
        compare(plan, arguments.scan, arguments.repeats)
    if arguments.large:
        measure_memory(plan, tuple(arguments.large), arguments.uncertainty)


def compare(plan: Plan, path: Path, repeats: int) -> None:
    """Print medians of seconds, taken in turns, so that a busy machine slows all alike."""
    network = new_specialist(plan).eval()
    predictor = Predictor([TrainedModel(path, plan, network, "0" * 64, None)], CPU)
    volume = read_volume(path)
    scan = prepare_image("x", volume.voxels[None].copy(), volume.geometry, plan.data)
    out = Path(tempfile.mkdtemp()) / "out.nii.gz"

    def bare() -> None:
        with torch.inference_mode():
            sliding_window_inference(
                scan.image[None], plan.data.patch, 2, network, plan.evaluation.overlap, mode="gaussian"
            )

    def rolling() -> None:
        with torch.inference_mode():
            classes = 1 + len(plan.task.classes)
            SlidingProbabilities(network, scan.image, classes, plan.data.patch, plan.evaluation.overlap, CPU).advance(
                scan.grid.shape[0]
            )

    def whole() -> None:
        again = read_volume(path)
        found = predictor.segment(again.voxels[None], again.geometry, "x")
        write_nifti(out, found.labels, again.geometry, path)

    works: dict[str, Callable[[], object]] = {
        "bare sliding window": bare,
        "probabilities, row by row": rolling,
        "MONAI's to the scan's own grid": lambda: segmentation(
            to_original(infer(network, scan.image, plan, CPU), scan), plan
        ),
        "segment on the scan's own grid": lambda: segment_original(network, scan, plan, CPU),
        "read, prepare, segment, write": whole,
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if number:  # the first is for warming up
                seconds[name].append(time.process_time() - began)
    base = statistics.median(seconds["bare sliding window"])
    print(f"{path.name}: {volume.geometry.shape}, {tuple(scan.image.shape[1:])} on the plan's grid")
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"{name:32s} {middle:7.2f} s of CPU  {middle / base:5.2f} x  (from {min(each):.2f} to {max(each):.2f})")


def measure_memory(plan: Plan, shape: tuple[int, int, int], uncertainty: bool) -> None:
    """Print the peak memory of segmenting a made scan, beyond what the process has before, and the estimate."""
    predictor = Predictor([TrainedModel(Path("made"), plan, new_specialist(plan).eval(), "0" * 64, None)], CPU)
    channels = len(plan.task.channels)
    grid = Geometry(shape, torch.diag(torch.tensor([-0.7, -0.7, 0.7, 1.0], dtype=torch.float64)))
    before = _peak_gb()
    began = time.monotonic()
    stack = np.random.default_rng(0).random((channels, *shape), dtype=np.float32)
    predictor.segment(stack, grid, "x", uncertainty)
    print(f"{shape}: peak {_peak_gb() - before:.2f} GB beyond {before:.2f} GB; {time.monotonic() - began:.0f} s")
    print(f"estimated {needed_gb(grid, [plan], uncertainty):.2f} GB")


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
