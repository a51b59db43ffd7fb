"""What a radiologist's minutes buy: Dice against annotation minutes, in ranked and in random order.

    python benchmarks/review_loop.py --work loop --scans 8 --tested 4 --rounds 4 --steps 50 --seeds 0 1

One site of the data trains with one labeled scan until its unlabeled scans have pseudo-labels. From there the study
goes on once for each order and budget of minutes: scans are reviewed in that order while the budget lasts, and the
remaining rounds train on what came of it. The radiologist is simulated: the correction is the true label, the rating is
by the Dice of the pseudo-label (mean over classes), and the minutes are by rating. So the curve says what the order is
worth if minutes are as assumed, not how fast people are. Also printed: the rank correlation of doubt and error of the
pseudo-labels.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from scipy.stats import spearmanr
from torch import Tensor

from client.reviews import Rating
from client.site import Site
from client.site_config import load_site_config
from review.masks import Mask, read_mask
from review.reviewing import Opened, Reviewing
from semisam_core.evaluation import dice_of
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan, load_plan

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PLANS = {"hippocampus": "hippocampus", "la": "left-atrium"}
LOWEST_DICE = {Rating.NO_REVISION: 0.92, Rating.MINOR_REVISION: 0.82, Rating.MAJOR_REVISION: 0.65, Rating.REJECT: 0.0}
MINUTES = {Rating.NO_REVISION: 0.5, Rating.MINOR_REVISION: 6.0, Rating.MAJOR_REVISION: 20.0, Rating.REJECT: 30.0}
CHEAP = (  # sources that need no generalist
    "pseudo_labels.sources.generalists=false",
    "pseudo_labels.sources.feature_head=null",
    "pseudo_labels.sources.prototypes=null",
    "pseudo_labels.gates.minimum_agreement=0.0",  # so that a short training gets pseudo-labels too
)


def main() -> None:
    """Run the loop and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=PLANS, default="hippocampus")
    parser.add_argument("--work", type=Path, required=True, help="folder for the sites; emptied first")
    parser.add_argument("--scans", type=int, default=12, help="unlabeled scans")
    parser.add_argument("--tested", type=int, default=8, help="validation scans")
    parser.add_argument("--rounds", type=int, default=6, help="before the reviews, and as many afterwards")
    parser.add_argument("--steps", type=int, default=20, help="a round")
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.0, 60.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.work, ignore_errors=True)
    lines = [line for seed in arguments.seeds for line in _loop(arguments, seed)]
    (arguments.work / "results.json").write_text(json.dumps(lines, indent=2))
    print(f"{'seed':>4} {'order':<8} {'budget':>7} {'minutes':>8} {'reviewed':>8} {'Dice':>6}")
    for line in lines:
        print(
            f"{line['seed']:>4} {line['order']:<8} {line['budget']:>7.0f} {line['minutes']:>8.1f} "
            f"{line['reviewed']:>8} {line['dice']:>6.3f}"
        )


def _loop(arguments: argparse.Namespace, seed: int) -> list[dict[str, float | str]]:
    changes = [
        f"training.rounds={2 * arguments.rounds}",
        f"training.steps_per_round={arguments.steps}",
        f"pseudo_labels.first_round={arguments.rounds}",
        "pseudo_labels.refresh_every=2",
        f"seed={seed}",
        *CHEAP,
    ]
    plan = load_plan(ROOT / "site_configs" / PLANS[arguments.data] / "plan.yaml", changes)
    folder = arguments.work / f"seed-{seed}"
    base = _write_site(folder / "base", arguments, seed)
    weights: dict[str, Tensor] = dict(new_specialist(plan).state_dict())
    weights = _train(base, plan, weights, range(1, arguments.rounds + 1))
    reviewing = Reviewing(load_site_config(base), plan, "simulated")
    entries = reviewing.worklist()
    truth = DATA / arguments.data / "labels"
    dices = {entry.case: _dice(reviewing.open(entry.case), plan, truth) for entry in entries}
    correlation = spearmanr([entry.doubt for entry in entries], [1 - dices[entry.case] for entry in entries])
    print(f"seed {seed}: {len(entries)} pseudo-labels, mean Dice {sum(dices.values()) / len(dices):.3f}, ", end="")
    print(f"rank correlation of doubt and error {correlation.statistic:.2f}")
    ranked = [entry.case for entry in entries]
    shuffled = random.Random(seed).sample(ranked, len(ranked))
    lines: list[dict[str, float | str]] = []
    for budget in arguments.minutes:
        for order, cases in (("ranked", ranked), ("random", shuffled)) if budget else (("none", []),):
            site = _copy(base, folder / f"{order}-{budget:g}")
            reviewed, minutes = _review(site, plan, cases, budget, truth)
            final = _train(site, plan, weights, range(arguments.rounds + 1, 2 * arguments.rounds + 1))
            dice = _score(site, plan, final)
            lines.append({"seed": seed, "order": order, "budget": budget, "minutes": minutes, "reviewed": reviewed})
            lines[-1]["dice"] = dice
    return lines


def _write_site(folder: Path, arguments: argparse.Namespace, seed: int) -> Path:
    data = DATA / arguments.data
    with (data / "sites.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(seed)
    trained = draw.sample(sorted(row["case"] for row in rows if row["split"] == "train"), arguments.scans + 1)
    tested = sorted(row["case"] for row in rows if row["split"] != "train")[: arguments.tested]
    images = folder / "images"
    images.mkdir(parents=True)
    for path in (data / "images").iterdir():
        if path.name.split(".")[0] in {*trained, *tested}:
            (images / path.name).symlink_to(path)
    content = {
        "version": 1,
        "site": "one",
        "data": {"images": "images", "labels": str(data / "labels"), "labeled": trained[:1], "validation": tested},
        "generalists": {},
        "device": "cpu",
        "threads": 1,
        "storage": {"folder": "storage"},
        "egress": {"numbers": "exact"},
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _copy(site: Path, folder: Path) -> Path:
    shutil.copytree(site.parent, folder, symlinks=True)
    return folder / site.name


def _train(path: Path, plan: Plan, weights: dict[str, Tensor], rounds: Sequence[int]) -> dict[str, Tensor]:
    for number in rounds:
        weights = Site(load_site_config(path), plan, "run", number).train(weights).weights or weights
    return weights


def _review(path: Path, plan: Plan, cases: Sequence[str], budget: float, truth: Path) -> tuple[int, float]:
    """Review scans while the budget lasts; return how many, and the minutes that took."""
    reviewing, spent, done = Reviewing(load_site_config(path), plan, "simulated"), 0.0, 0
    for name in cases:
        opened = reviewing.open(name)
        dice = _dice(opened, plan, truth)
        rating = next(each for each in Rating if dice >= LOWEST_DICE[each])
        if spent + MINUTES[rating] > budget:
            break
        label = None if rating is Rating.NO_REVISION else _true(opened, plan, truth)
        ratings = dict.fromkeys(plan.class_names, int(rating))
        reviewing.keep(opened, ratings, MINUTES[rating], label, "simulated")
        spent, done = spent + MINUTES[rating], done + 1
    return done, spent


def _true(opened: Opened, plan: Plan, truth: Path) -> Mask:
    return read_mask(truth / f"{opened.case.id}.nii.gz", opened.case, plan)[0]


def _dice(opened: Opened, plan: Plan, truth: Path) -> float:
    found, true = torch.from_numpy(opened.mask), torch.from_numpy(_true(opened, plan, truth))
    classes = range(1, len(plan.class_names) + 1)
    return sum(dice_of(found == k, true == k) for k in classes) / len(classes)


def _score(path: Path, plan: Plan, weights: dict[str, Tensor]) -> float:
    site = Site(load_site_config(path), plan, "run", plan.training.rounds)
    site.evaluate(weights, final=False)
    lines = [line for line in read_json_lines(site.state.folder / "scores.jsonl") if "dice" in line]
    return sum(line["dice"] for line in lines) / len(lines)


if __name__ == "__main__":
    main()
