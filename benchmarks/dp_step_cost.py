"""CPU time and memory of one private step against a plain one, by different ways to get at patients' gradients.

python benchmarks/dp_step_cost.py                  a minute on a core of its own

Each way runs in a process of its own. `patient` is the way that training takes: one backward pass for each patient.
The others take all patients in one batch and give each patch a gradient: Opacus's hooks, its functorch mode, and ghost
clipping (norms only, then a second backward pass). `off` is how far the clipped sum differs from `patient`'s.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from semisam_core.losses import supervised_loss
from semisam_core.privacy.gradients import patient_gradient
from semisam_core.specialists import build_specialist

WAYS = ("plain", "patient", "hooks", "functorch", "ghost")
ARGUMENTS = {"channels": [16, 32, 64], "strides": [2, 2], "residual_units": 1}  # the hippocampus plan's
NORM, REPEATS = 1.0, 3


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="of a cubic patch, in voxels")
    parser.add_argument("--way", choices=WAYS, help="one way, in this process")
    options = parser.parse_args()
    if options.way is None:
        print(f"UNet {ARGUMENTS['channels']}, {options.patients} patients, patches of {options.side}^3, one CPU thread")
        for way in WAYS:
            given = ["--patients", str(options.patients), "--side", str(options.side), "--way", way]
            subprocess.run([sys.executable, __file__, *given], check=True)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sides = (options.side,) * 3
    image, label = torch.randn(options.patients, 1, *sides), torch.randint(0, 3, (options.patients, *sides))
    network = build_specialist("unet", ARGUMENTS, 1, 2, 0).train()
    reference = copy.deepcopy(network)
    step = {"plain": _plain, "patient": _patient, "ghost": _ghost}.get(options.way)
    step = step or (lambda n, x, y: _per_patch(n, x, y, functorch=options.way == "functorch"))
    taken = step(network, image, label)
    before = _peak_mb()
    taken()
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        found = taken()
        times.append(time.process_time() - began)
    memory = _peak_mb() - before
    off = "" if options.way == "plain" else f"off {_distance(found, _patient(reference, image, label)()):.1e}"
    print(f"{options.way:10} {min(times):6.3f} s of CPU   peak memory +{memory:5.0f} MB   {off}", flush=True)


Step = Callable[[], list[Tensor]]


def _plain(network: nn.Module, image: Tensor, label: Tensor) -> Step:
    def step() -> list[Tensor]:
        network.zero_grad()
        supervised_loss(network(image), label).backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    return step


def _patient(network: nn.Module, image: Tensor, label: Tensor) -> Step:
    def step() -> list[Tensor]:
        parameters = list(network.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        for k in range(len(image)):
            gradient = patient_gradient(supervised_loss(network(image[k : k + 1]), label[k : k + 1]), parameters)
            assert gradient is not None
            norm = torch.stack([each.norm() for each in gradient]).norm()
            for sum_, each in zip(total, gradient, strict=True):
                sum_ += each * min(1.0, NORM / (float(norm) + 1e-6))
        return total

    return step


def _losses(logits: Tensor, label: Tensor) -> Tensor:
    return torch.stack([supervised_loss(logits[k : k + 1], label[k : k + 1]) for k in range(len(label))])


def _per_patch(network: nn.Module, image: Tensor, label: Tensor, functorch: bool) -> Step:
    from opacus import GradSampleModule

    module = GradSampleModule(network, loss_reduction="sum", force_functorch=functorch)

    def step() -> list[Tensor]:
        module.zero_grad()
        _losses(module(image), label).sum().backward()
        parameters = list(module.parameters())
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
        factors = (NORM / (norms + 1e-6)).clamp(max=1)
        return [torch.einsum("i,i...->...", factors, p.grad_sample) for p in parameters]

    return step


def _ghost(network: nn.Module, image: Tensor, label: Tensor) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(
        network, max_grad_norm=NORM, use_ghost_clipping=True, loss_reduction="sum"
    )

    def step() -> list[Tensor]:
        module.zero_grad()
        losses = _losses(module(image), label)
        losses.sum().backward(retain_graph=True)
        factors = module.get_clipping_coef()
        module.disable_hooks()
        module.zero_grad()
        (factors * losses).sum().backward()
        module.enable_hooks()
        return [p.grad for p in module.parameters() if p.grad is not None]

    return step


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    a, b = (torch.cat([each.flatten() for each in tensors]) for tensors in (one, other))
    return float((a - b).norm() / b.norm())


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
