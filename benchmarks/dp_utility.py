"""Dice against epsilon of patient-level differential privacy, on hippocampi and on a phantom with many patients.

python benchmarks/dp_utility.py hippocampus --data <folder with images, labels, sites.csv>
python benchmarks/dp_utility.py phantom --patients 500 --rate 0.2 --learning-rate 0.01

Phantoms are coarse, so that many patients can be had: privacy hides each among all that learn with it.

Supervised and mean-teacher terms, no generalist: each site labels some of its training patients and learns from the
others without labels. Every arm is a study in this process with the same plan, but for the noise that its epsilon
demands; `none` trains without privacy on as many patches a step as the private arms expect, `clipped` with gradients
clipped and next to no noise. Epsilon is of each site's patients at delta 1e-5, as booked in the sites' ledgers.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from client.app import SIMULATION
from client.app import app as client_app
from client.privacy import privacy_report
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from semisam_core.data.phantom import DEMO_SCANNERS, write_phantom_site
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan, load_plan
from semisam_core.privacy.accounting import Spending, epsilon_of
from server.app import app as server_app

CONFIGS = Path(__file__).resolve().parents[1] / "site_configs"
DELTA = 1e-5
NEXT_TO_NO_NOISE = 1e-3
SMALL = "specialist.arguments={channels: [8, 16, 32], strides: [2, 2], residual_units: 1, normalization: instance}"
SCANNERS = ("north", "south")
COARSE = (12.8, 12.8, 16.0)  # mm; a phantom has 16 x 16 x 8 voxels


def main() -> None:
    """Run the arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_set", choices=("hippocampus", "phantom"))
    parser.add_argument("--data", type=Path, help="hippocampus: folder with images, labels and sites.csv")
    parser.add_argument("--patients", type=int, default=500, help="phantom: patients of each of two sites")
    parser.add_argument("--arms", default="none,clipped,16,8,4,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--norm", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--labeled", type=float, default=0.5, help="share of training patients with labels")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sites", type=int, default=4, help="hippocampus: how many of the four sites")
    parser.add_argument("--validation", type=int, default=10, help="validation scans of each site, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sites, patients = _sites(options, place)
        print(
            f"{len(sites)} sites of {patients} training patients, {options.rounds} x {options.steps} steps", flush=True
        )
        print("arm      noise   epsilon (rdp)     Dice by class and seed             s a round and site", flush=True)
        for arm in options.arms.split(","):
            noise = _noise(arm, options)
            runs = [
                _run(place / f"{arm}-{seed}", _plan(options, noise, seed, patients), sites)
                for seed in range(options.seeds)
            ]
            epsilon, rdp, seconds = runs[0][1:]
            dice = "  ".join("/".join(f"{value:.3f}" for value in scores) for scores, *_ in runs)
            print(f"{arm:8} {noise or 0:<7.3g} {epsilon:8.2f} ({rdp:.2f})  {dice:36} {seconds:.1f}", flush=True)


def _sites(options: argparse.Namespace, place: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the content of each site's YAML, and how many training patients each has."""
    if options.data_set == "phantom":
        held_out, found = options.validation, []
        for number, site in enumerate(SCANNERS):
            write_phantom_site(
                place / site, replace(DEMO_SCANNERS[site], spacing_mm=COARSE), options.patients + held_out, number, site
            )
            cases = sorted(path.name.removesuffix(".nii.gz") for path in (place / site / "images").iterdir())
            found.append(_site(site, place / site, cases[:-held_out], cases[-held_out:], [], options.labeled))
        return found, options.patients
    with (options.data / "sites.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = []
    for site in sorted({row["site"] for row in rows})[: options.sites]:
        train, validation = (
            sorted(r["case"] for r in rows if (r["site"], r["split"]) == (site, s)) for s in ("train", "val")
        )
        used = {*train, *validation[: options.validation]}
        others = [row["case"] for row in rows if row["case"] not in used]
        found.append(_site(site, options.data, train, validation[: options.validation], others, options.labeled))
    return found, len(train)


def _site(
    name: str, folder: Path, train: Sequence[str], validation: Sequence[str], excluded: Sequence[str], labeled: float
) -> dict[str, Any]:
    return {
        "version": 1,
        "site": name,
        "data": {
            "images": str(folder.resolve() / "images"),
            "labels": str(folder.resolve() / "labels"),
            "labeled": list(train[: round(labeled * len(train))]),
            "validation": list(validation),
            "excluded": list(excluded),
        },
        "threads": 1,
        "egress": {"validation_scores": ["dice", "cases"], "epsilon": True},
        # Noise from a seed, so that a table can be made again; limits that let every arm run to its end.
        "privacy": {"noise": "seeded", "maximum_epsilon": 1e12, "minimum_noise": 0.0},
    }


def _noise(arm: str, options: argparse.Namespace) -> float | None:
    """Return the smallest noise multiplier, to 1 %, whose steps spend no more than the arm's epsilon."""
    if not arm.replace(".", "").isdigit():
        return None if arm == "none" else NEXT_TO_NO_NOISE
    low, high = 0.1, 100.0
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        spent = epsilon_of([Spending(middle, options.rate, options.rounds * options.steps)], DELTA)
        low, high = (low, middle) if spent.value <= float(arm) else (middle, high)
    return high


def _plan(options: argparse.Namespace, noise: float | None, seed: int, patients: int) -> Plan:
    expected = max(1, round(options.rate * patients / 2))  # patches of labeled scans, and as many of unlabeled ones
    privacy = f"{{noise_multiplier: {noise or 0:.6f}, clipping_norm: {options.norm}, sampling_rate: {options.rate}}}"
    changes = [
        "pseudo_labels=null",
        SMALL,
        f"training.rounds={options.rounds}",
        f"training.steps_per_round={options.steps}",
        f"training.labeled_batch={min(64, expected)}",
        f"training.unlabeled_batch={min(64, expected)}",
        f"training.optimizer={{name: adamw, learning_rate: {options.learning_rate}, state: kept}}",
        "training.augmentation={flip: 0.0, affine_probability: 0.0, intensity: 0.1, noise: 0.0}",
        "regularizer={name: mean-teacher, weight: 0.1, ramp_share: 0.4}",
        "aggregation.weights=equal",
        "aggregation.minimum_sites=1",
        "aggregation.rule=weighted-mean",
        f"evaluation.every_rounds={options.rounds}",
        f"privacy={privacy if noise is not None else 'null'}",
        f"seed={seed}",
    ]
    if options.data_set == "phantom":
        changes += ["data.spacing_mm=[12.8, 12.8, 16.0]", "data.patch=[16, 16, 8]"]
    return load_plan(CONFIGS / options.data_set / "plan.yaml", changes)


def _run(folder: Path, plan: Plan, sites: Sequence[dict[str, Any]]) -> tuple[list[float], float, float, float]:
    """Return Dice by class, over all sites' validation scans; epsilon by PRV and by RDP; seconds a round and site."""
    folder.mkdir(parents=True)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    paths = []
    for site in sites:
        path = folder / f"{site['site']}.yaml"
        own = {
            "storage": {
                "folder": str(folder.parent / "storage" / site["site"])
            },  # scans are prepared once for all arms
            "privacy": site["privacy"] | {"ledger": str(folder / "ledger" / site["site"])},
        }
        path.write_text(yaml.safe_dump(site | own))
        shutil.rmtree(folder.parent / "storage" / site["site"] / "runs", ignore_errors=True)
        (folder.parent / "storage" / site["site"] / "privacy-witness.json").unlink(missing_ok=True)
        paths.append(path)
    config: dict[str, str | int] = {
        "plan": str(folder / "plan.yaml"),
        "num-sites": len(paths),
        "run-folder": str(folder / "run"),
    }
    began = time.monotonic()
    run_in_process(server_app, client_app, [{"site-config": str(path), SIMULATION: 1} for path in paths], config)
    seconds = (time.monotonic() - began) / plan.training.rounds / len(paths)
    scored = [line for line in read_json_lines(folder / "run" / "metrics.jsonl") if line["event"] == "evaluated"]
    last = {line["site"]: line for line in scored}
    dice = [
        fmean(line[f"dice.{name}"] for line in last.values() if f"dice.{name}" in line) for name in plan.class_names
    ]
    spent = privacy_report(load_site_config(paths[0]), DELTA).total
    (folder / "result.json").write_text(json.dumps({"dice": dice, "epsilon": spent.value}))
    return dice, spent.value if plan.privacy else float("inf"), spent.rdp if plan.privacy else float("inf"), seconds


if __name__ == "__main__":
    main()
