"""How hard the phantom is: supervised Dice on held-out phantoms of one hospital, with 1 and with 12 labeled scans.

python benchmarks/phantom_difficulty.py            about 4 minutes on one core
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from semisam_core.data.cases import Case, Role
from semisam_core.data.patches import TrainingScan
from semisam_core.data.phantom import DEMO_SCANNERS, write_phantom_site
from semisam_core.data.scans import Scan, load_scan
from semisam_core.evaluation import dice_of
from semisam_core.inference import new_specialist, predict, segmentation
from semisam_core.plan import Plan, load_plan
from semisam_core.training import LocalRound, new_teacher, train_round

PLAN = Path(__file__).resolve().parents[1] / "site_configs" / "phantom" / "plan.yaml"
ALL_THAT_IS_PREDICTED = "task.classes=[{name: liver, value: 1}]"  # islands are scored too
SITE, SEED, TRAIN, TEST = "north", 7, 12, 6
CPU = torch.device("cpu")


def main() -> None:
    """Print one line for each number of labels."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_phantom_site(Path(folder), DEMO_SCANNERS[SITE], TRAIN + TEST, SEED, SITE)
        for labels, steps in ((1, 240), (1, 900), (TRAIN, 900)):
            plan = _plan(steps)
            scans = [load_scan(_case(Path(folder), number), plan) for number in range(TRAIN + TEST)]
            scores = _train_and_score(plan, scans[:labels], scans[TRAIN:])
            shown = ", ".join(f"{score:.2f}" for score in scores)
            print(f"{labels:2d} labeled, {steps} steps: mean Dice {sum(scores) / len(scores):.3f} ({shown})")


def _plan(steps: int) -> Plan:
    changes = [ALL_THAT_IS_PREDICTED, "regularizer.name=none", "pseudo_labels=null", "training.rounds=1"]
    return load_plan(PLAN, [*changes, f"training.steps_per_round={steps}"])


def _case(folder: Path, number: int) -> Case:
    name = f"{SITE}-{number:02d}"
    return Case(name, (folder / "images" / f"{name}.nii.gz",), folder / "labels" / f"{name}.nii.gz", Role.LABELED)


def _train_and_score(plan: Plan, train: Sequence[Scan], test: Sequence[Scan]) -> list[float]:
    specialist = new_specialist(plan)
    train_round(LocalRound(plan, specialist, new_teacher(specialist), [_loader(scan) for scan in train], [], 1, 0, CPU))
    scores = []
    for scan in test:
        if scan.label is None:
            raise ValueError("phantoms have labels")
        found = segmentation(predict(specialist, scan.image, plan, CPU), plan)
        scores.append(dice_of(found == 1, scan.label == 1))
    return scores


def _loader(scan: Scan) -> Callable[[], TrainingScan]:
    return lambda: TrainingScan(scan.image, scan.label)


if __name__ == "__main__":
    main()
