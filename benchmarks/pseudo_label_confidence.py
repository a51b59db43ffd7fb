"""Does the confidence in a pseudo-label, the mean of exp(-U), tell good ones from bad? Reads finished comparisons.

python benchmarks/pseudo_label_confidence.py comparison [another-comparison ...]

Each is a folder of `semisam compare` with the arm federated-semisam whose sites still have their storage, and labels
for their unlabeled scans; no run read those labels, and here they are used for scoring only. The last pseudo-labels of
each finished run are scored on the specialist's grid. Nothing is trained; takes a minute on one core.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from client.site_config import inventory, load_site_folder
from engines.run_state import run_name, run_state
from semisam_core.data.cases import Role
from semisam_core.data.scans import load_scan, prepared_key
from semisam_core.evaluation import dice_of
from semisam_core.plan import load_plan
from semisam_core.pseudo_labels.store import PseudoLabelStore

ARM = "federated-semisam"
BANDS = (0.0, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 1.0)


def main() -> None:
    """Print the Dice of pseudo-labels by band of confidence, and the correlation of the two in each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", type=Path, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything: list[tuple[float, float]] = []
    print("| run | pseudo-labels | Dice | confidence | correlation |\n| --- | ---: | ---: | ---: | ---: |")
    for comparison in arguments.comparisons:
        for folder in sorted((comparison / "arms" / ARM).glob("*/*")):
            if run_state(folder) != "completed" or not (found := list(_scored(comparison, folder))):
                continue
            everything += found
            print(f"| {comparison.name}, {folder.parent.name}, {folder.name} | {_summary(found)} |", flush=True)
    if not everything:
        raise SystemExit("no finished run of these comparisons has any accepted pseudo-labels")
    print(f"| all | {_summary(everything)} |")
    print("\n| confidence | pseudo-labels | Dice | kept from here on | Dice |\n| --- | ---: | ---: | ---: | ---: |")
    values = np.array(everything)
    for low, high in itertools.pairwise(BANDS):
        within = values[(values[:, 1] >= low) & ((values[:, 1] < high) | (high == BANDS[-1])), 0]
        above = values[values[:, 1] >= low, 0]
        print(f"| {low:.2f} to {high:.2f} | {_mean(within)} | {_mean(above)} |")


def _scored(comparison: Path, folder: Path) -> Iterator[tuple[float, float]]:
    """Yield Dice and confidence of each accepted pseudo-label of a run, class by class."""
    plan = load_plan(folder / "plan.yaml")
    for config in load_site_folder(comparison / "sites" / folder.parent.name / "each"):
        storage = config.storage.folder
        store = PseudoLabelStore(storage / "runs" / run_name(folder) / "pseudo_labels")
        for case in inventory(config, plan).of(Role.UNLABELED):
            pseudo_label = store.load(prepared_key(case, plan))
            if pseudo_label is None:
                continue
            known = replace(case, label=config.data.labels / case.images[0].name, role=Role.LABELED)
            truth = load_scan(known, plan, storage / "prepared").label
            if truth is None:
                raise SystemExit(f"{case.id} has no label to score against")
            accepted = [k for k, valid in enumerate(pseudo_label.valid.tolist()) if valid]
            for k, confidence in zip(accepted, pseudo_label.confidences(), strict=True):
                yield dice_of(pseudo_label.target[k] > 0.5, truth == k + 1), confidence


def _summary(found: list[tuple[float, float]]) -> str:
    dice, confidence = np.array(found).T
    together = np.corrcoef(dice, confidence)[0, 1] if len(found) > 1 else float("nan")
    return f"{len(found)} | {dice.mean():.3f} | {confidence.mean():.3f} | {together:.2f}"


def _mean(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    return f"{len(values)} | {values.mean():.3f}" if len(values) else "0 | -"


if __name__ == "__main__":
    main()
