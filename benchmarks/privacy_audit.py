"""How much attackers learn of patients, with and without differential privacy and secure aggregation.

    python benchmarks/privacy_audit.py --json audit.json
    python benchmarks/privacy_audit.py --only canaries --runs 1000 --epsilon 4

Everything is on small generated patients (coarse phantoms, a patch each, the liver labeled), trained by the product's
own rounds without augmentation, which suits attackers. Three attacks, by options of the plan:

- membership: was this patient trained on? By the loss (Yeom et al., CSF 2018) and by likelihood ratio with shadow
  models (offline LiRA, Carlini et al., S&P 2022), on the final specialist, and on one site's last update, which a
  server without secure aggregation has too.
- inversion: what did the patient's scan look like (Geiping et al., NeurIPS 2020)? On one update of one patient.
- canaries: patients are planted, and told from runs without them. What that says of epsilon at least (Jagielski et al.,
  NeurIPS 2020; Nasr et al., S&P 2021), beside what the ledger books at most.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from privacy_attacks import (
    Estimate,
    Floats,
    Members,
    advantage,
    area_under_curve,
    detected,
    epsilon_bound,
    gradient_of,
    invert,
    largest_bound,
    likelihood_scores,
    likeness,
    loss_scores,
    own_likeness,
    with_interval,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from client.privacy import delta_of, round_spending
from semisam_core.configuration import override
from semisam_core.contract import update_spec
from semisam_core.data.patches import TrainingScan
from semisam_core.data.phantom import ORGAN_NAMES, Scanner, make_phantom
from semisam_core.inference import new_specialist
from semisam_core.losses import supervised_loss
from semisam_core.plan import Plan
from semisam_core.privacy.accounting import Spending, epsilon_of
from semisam_core.privacy.randomness import SeededRandomness
from semisam_core.privacy.training import Patient, train_private_round
from semisam_core.secure_aggregation.fixed_point import decode, encode
from semisam_core.secure_aggregation.masks import Vector, add_all_masks, add_mask, new_key_pair, new_seed
from semisam_core.secure_aggregation.weights import WholeWeights
from semisam_core.training import LocalRound, new_teacher, train_round

COARSE = Scanner((12.8, 12.8, 16.0), "RAS", gain=1.0, offset=0.0, gamma=1.0, bias=0.25, noise=0.045)
SHAPE = (16, 16, 8)  # of such a phantom, which is one patch
CPU = torch.device("cpu")
SITES = ("east", "north", "south")
PLAN: dict[str, Any] = {
    "version": 1,
    "task": {"name": "audit", "classes": [{"name": "liver", "value": 1}], "channels": ["mr"]},
    "data": {
        "spacing_mm": [12.8, 12.8, 16.0],
        "intensity": {"kind": "percentiles", "lower": 0.5, "upper": 99.5},
        "patch": list(SHAPE),
    },
    "specialist": {"name": "unet", "arguments": {"channels": [16, 32], "strides": [2], "residual_units": 0}},
    "training": {
        "rounds": 4,
        "steps_per_round": 25,
        "labeled_batch": 4,
        "optimizer": {"name": "adamw", "learning_rate": 0.003, "weight_decay": 0.0, "final_share": 1.0},
        "augmentation": {"flip": 0.0, "affine_probability": 0.0, "intensity": 0.0, "noise": 0.0},
    },
    "pseudo_labels": None,
    "regularizer": {"name": "none"},
    "aggregation": {"weights": "equal", "minimum_sites": 3, "admission": {"norm_factor": None}},
    "seed": 0,
}
ONE_STEP = ("training.rounds=1", "training.steps_per_round=1", "training.labeled_batch=1")
SGD = "training.optimizer={name: sgd, learning_rate: 0.02, weight_decay: 0.0, final_share: 1.0}"
Tick = Callable[[], None]
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Person:
    """A generated patient: image (1, 1, H, W, D) with mean 0 and deviation 1, label (1, H, W, D)."""

    id: str
    image: Tensor
    label: Tensor

    def patient(self) -> Patient:
        """Return the patient as private training takes it."""
        return Patient(self.id, [self.scan])

    def scan(self) -> TrainingScan:
        """Return the one scan."""
        return TrainingScan(self.image[0], self.label[0])


def person(seed: int) -> Person:
    """Return a generated patient."""
    scan, organs = make_phantom(COARSE, seed)
    label = organs == 1 + ORGAN_NAMES.index("liver")
    image = torch.from_numpy((scan - scan.mean()) / scan.std())
    return Person(f"p{seed}", image[None, None], torch.from_numpy(label.astype(np.uint8))[None])


def canary(seed: int) -> Person:
    """Return a patient unlike all others: an image of noise, labeled where a phantom's liver is not."""
    random = torch.Generator().manual_seed(seed)
    return Person("canary", torch.randn((1, 1, *SHAPE), generator=random), 1 - person(seed).label)


def plan_of(*assignments: str) -> Plan:
    """Return the audit's plan, changed by dotted assignments."""
    return Plan.model_validate_json(json.dumps(override(PLAN, list(assignments))))


def privacy_for(epsilon: float, delta: float, rate: float, steps: int, norm: float) -> str:
    """Return the plan's section whose noise, to 1 %, is the least with which so many steps spend no more."""
    low, high = 0.1, 100.0
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        spent = epsilon_of([Spending(middle, rate, steps)], delta)
        low, high = (low, middle) if spent.value <= epsilon else (middle, high)
    return privacy_section(high, delta, rate, norm)


def privacy_section(noise: float, delta: float, rate: float, norm: float) -> str:
    """Return a plan's section on privacy."""
    numbers = (f"{noise:.6f}", f"{norm:.6f}", f"{rate:.6f}", f"{delta:.12f}")
    keys = ("noise_multiplier", "clipping_norm", "sampling_rate", "delta")
    return "privacy={" + ", ".join(f"{key}: {number}" for key, number in zip(keys, numbers, strict=True)) + "}"


def spent_in(plan: Plan, rounds: int) -> float | None:
    """Return the epsilon that a site's ledger has after so many rounds; None if there is no bound."""
    if plan.privacy is None:
        return None
    spent = epsilon_of([round_spending(plan)] * rounds, delta_of(plan)).value
    return spent if math.isfinite(spent) else None


def trained(plan: Plan, start: nn.Module, people: Sequence[Person], number: int, seed: int) -> nn.Module:
    """Return what a site makes of a specialist in one round."""
    return trained_on(plan, start, [each.patient() for each in people], number, seed)


def trained_on(plan: Plan, start: nn.Module, patients: Sequence[Patient], number: int, seed: int) -> nn.Module:
    """Return what a site makes of a specialist in one round, with patients of whom some may have no scan."""
    specialist = copy.deepcopy(start)
    scans = [scan for each in patients for scan in each.labeled]
    local = LocalRound(plan, specialist, new_teacher(specialist), scans, (), number, seed, CPU)
    if plan.privacy is None:
        train_round(local)
    else:
        train_private_round(local, patients, SeededRandomness(2 * seed))
    return specialist


def mean_of(networks: Sequence[nn.Module]) -> nn.Module:
    """Return the unweighted mean of networks."""
    found, states = copy.deepcopy(networks[0]), [each.state_dict() for each in networks]
    found.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return found


def secure_mean(plan: Plan, start: Weights, updates: Mapping[str, Weights]) -> tuple[Weights, dict[str, Vector]]:
    """Return the mean by a secure sum, and what the server sees of each site."""
    settings, spec = plan.aggregation.secure, update_spec(plan)
    if settings is None:
        raise ValueError("the plan does not ask for secure aggregation")
    keys, seeds = {name: new_key_pair() for name in updates}, {name: new_seed() for name in updates}
    seen = {}
    for name, update in updates.items():
        seen[name] = encode(update, start, spec, WholeWeights(1, 0)).copy()
        others = {other: public for other, (_, public) in keys.items() if other != name}
        add_all_masks(seen[name], name, seeds[name], keys[name][0], others)
    total = sum(seen.values(), np.zeros_like(next(iter(seen.values()))))
    for each in seeds.values():
        add_mask(total, each, -1)
    return decode(total, start, spec, len(updates), settings).tensors, seen


def loss_on(network: nn.Module, people: Sequence[Person]) -> Floats:
    """Return the supervised loss on each."""
    with torch.no_grad():
        return np.array([float(supervised_loss(network(each.image), each.label)) for each in people])


def dice_on(network: nn.Module, people: Sequence[Person]) -> float:
    """Return the mean Dice."""
    with torch.no_grad():
        found = [(network(each.image).argmax(1) == 1, each.label == 1) for each in people]
    return float(np.mean([2 * float((a & b).sum()) / max(1, float(a.sum() + b.sum())) for a, b in found]))


def membership(plan: Plan, options: argparse.Namespace, tick: Tick) -> dict[str, Any]:
    """Train a study for each model, of a random half of the patients dealt out to the sites, and attack each.

    Every model is attacked with the others as its shadow models.
    """
    people = [person(1000 + k) for k in range(options.patients)]
    random = np.random.default_rng(options.seed)
    final, update, dice = [], [], []
    members, of_site = np.zeros((2, options.models, len(people)), bool)
    for model in range(options.models):
        chosen = random.permutation(len(people))[: len(people) // 2]
        parts = [chosen[k :: len(SITES)] for k in range(len(SITES))]
        members[model, chosen] = of_site[model, parts[0]] = True
        specialist = new_specialist(plan)
        for number in range(1, plan.training.rounds + 1):
            seeds = [options.seed + 100_000 * model + 100 * number + k for k in range(len(parts))]
            locals_ = [
                trained(plan, specialist, [people[k] for k in part], number, seed)
                for part, seed in zip(parts, seeds, strict=True)
            ]
            specialist = mean_of(locals_)
            tick()
        final.append(loss_on(specialist, people))
        update.append(loss_on(locals_[0], people))
        dice.append(dice_on(specialist, [each for k, each in enumerate(people) if not members[model, k]]))
    views = {"final specialist": (final, members), "one site's last update": (update, of_site)}
    found = {name: _attacked(np.array(losses), inside, options.seed) for name, (losses, inside) in views.items()}
    return {"ledger": spent_in(plan, plan.training.rounds), "dice of others": float(np.mean(dice)), **found}


def _attacked(losses: Floats, members: Members, seed: int) -> dict[str, Any]:
    inside, outside = losses[members].mean(), losses[~members].mean()
    found: dict[str, Any] = {"loss of members": float(inside), "loss of others": float(outside)}
    for name, scores in (("loss", loss_scores(losses)), ("lira", likelihood_scores(losses, members))):
        found[name] = {
            "auc": asdict(with_interval(area_under_curve, scores, members, seed)),
            **{
                f"tpr at fpr {rate}": asdict(with_interval(partial(detected, rate=rate), scores, members, seed))
                for rate in (0.01, 0.05)
            },
        }
    found["loss"]["advantage"] = asdict(with_interval(advantage, losses, members, seed))
    return found


def inversion(
    plan: Plan, observed: Callable[[Weights, Weights, int], list[Tensor]], options: argparse.Namespace, tick: Tick
) -> dict[str, Any]:
    """Invert one step of one patient, for several patients in turn.

    Args:
        plan: of one step a round.
        observed: what the server makes of (weights before, after, seed), as a gradient.
        options: how many patients, iterations.
        tick: called after each iteration.
    """
    start, strangers = new_specialist(plan), [person(5000 + k) for k in range(options.strangers)]
    mean = torch.stack([each.image for each in strangers]).mean(0)
    rows = []
    for k in range(options.victims):
        victim = person(9000 + k)
        after = trained(plan, start, [victim], 1, options.seed + k)
        gradient = observed(start.state_dict(), after.state_dict(), options.seed + k)
        image = invert(start, victim.label, gradient, options.iterations, options.seed + k, tick)
        truth = torch.cat([each.flatten() for each in gradient_of(start, victim.image, victim.label)])
        flat = torch.cat([each.flatten() for each in gradient])
        rows.append(
            {
                "cosine of update and gradient": float(torch.cosine_similarity(flat, truth, dim=0)),
                "likeness": likeness(image, victim.image),
                "likeness of the mean of strangers": likeness(mean, victim.image),
                "own likeness": own_likeness(image, victim.image, mean),
                "recognised": float(all(likeness(image, victim.image) > likeness(image, x.image) for x in strangers)),
            }
        )
    found = {name: asdict(_mean([row[name] for row in rows], options.seed)) for name in rows[0]}
    return {"ledger": spent_in(plan, 1), **found}


def _mean(values: Sequence[float], seed: int) -> Estimate:
    array = np.array(values)
    drawn = np.random.default_rng(seed).integers(len(array), size=(1000, len(array)))
    low, high = np.percentile(array[drawn].mean(1), [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high))


def change(before: Weights, after: Weights, _: int = 0) -> list[Tensor]:
    """Return an update as the gradient that a step of SGD took."""
    return [before[name] - after[name] for name in before]


def masked_change(plan: Plan, before: Weights, after: Weights, seed: int) -> list[Tensor]:
    """Return the masked update of a site, read as if it were not masked: all that a server has of it."""
    others = {name: after if name == SITES[0] else before for name in SITES}
    seen = secure_mean(plan, before, others)[1][SITES[0]].view(np.int64)[2:]
    found, at = [], 0
    for value in before.values():
        found.append(-torch.from_numpy(seen[at : at + value.numel()].astype(np.float64) * 2.0**-63).float())
        found[-1], at = found[-1].reshape(value.shape), at + value.numel()
    return found


def canaries(plan: Plan, options: argparse.Namespace, tick: Tick) -> dict[str, Any]:
    """Tell rounds with a planted patient from rounds in which it has no scan.

    Two statistics: how far the update goes along the canary's own gradient, which a server without secure aggregation
    can compute, and how low the canary's loss is on the specialist that comes out.
    """
    start, planted = new_specialist(plan), canary(options.seed + 77)
    people = [person(7000 + k).patient() for k in range(options.company)]
    gradient = torch.cat([each.flatten() for each in gradient_of(start, planted.image, planted.label)])
    direction = (gradient / gradient.norm()).double()
    statistics: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in ("update", "loss")}
    for run in range(options.runs):
        for there in (True, False):
            guest = planted.patient() if there else Patient(planted.id)
            seed = options.seed + 1_000_000 + 2 * run + there
            after = trained_on(plan, start, [*people, guest], 1, seed)
            moved = torch.cat([each.flatten() for each in change(start.state_dict(), after.state_dict())])
            statistics["update"][there].append(float(moved.double() @ direction))
            statistics["loss"][there].append(-float(loss_on(after, [planted])[0]))
            tick()
    delta = options.delta
    bounds = {
        f"epsilon by the {name} is at least": epsilon_bound(np.array(found[True]), np.array(found[False]), delta)
        for name, found in statistics.items()
    }
    return {"ledger": spent_in(plan, 1), **bounds, "largest with so many runs": largest_bound(options.runs, delta)}


def main() -> None:
    """Run the attacks, print what they found, and write it as JSON."""
    options = _options()
    torch.set_num_threads(1)
    console, began = Console(stderr=True), time.monotonic()
    found: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    with Progress(console=console) as bars:
        for name, (run, steps) in _studies(options).items():
            if options.only in (None, name.split(", ")[0]):
                task = bars.add_task(name, total=steps)
                found[name] = run(partial(bars.advance, task))
    found["seconds"] = round(time.monotonic() - began)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def _studies(options: argparse.Namespace) -> dict[str, tuple[Callable[[Tick], dict[str, Any]], int]]:
    """Return each attack under each option, by name, and how many ticks it takes."""
    study, one, few = [f"training.rounds={options.rounds}"], [*ONE_STEP, SGD], [*ONE_STEP, SGD]
    few.append(f"training.steps_per_round={options.steps}")
    steps = plan_of(*study).training.total_steps
    rounds, inverted = options.models * options.rounds, options.victims * options.iterations

    def private(keys: Sequence[str], rate: float, taken: int) -> Plan:
        return plan_of(*keys, privacy_for(options.epsilon, options.delta, rate, taken, options.norm))

    def without_noise() -> Plan:
        return plan_of(*few, privacy_section(1e-6, options.delta, 0.5, options.norm))

    def inverted_under_masks(tick: Tick) -> dict[str, Any]:
        plan = plan_of(*one, "aggregation.secure={}")
        return inversion(plan, partial(masked_change, plan), options, tick)

    return {
        "membership, plain": (lambda tick: membership(plan_of(*study), options, tick), rounds),
        "membership, private": (
            lambda tick: membership(private(study, options.rate, steps), options, tick),
            rounds,
        ),
        "inversion, plain": (lambda tick: inversion(plan_of(*one), change, options, tick), inverted),
        "inversion, private": (lambda tick: inversion(private(one, 1.0, 1), change, options, tick), inverted),
        "inversion, secure": (inverted_under_masks, inverted),
        "canaries, without noise": (lambda tick: canaries(without_noise(), options, tick), 2 * options.runs),
        "canaries, private": (lambda tick: canaries(private(few, 0.5, options.steps), options, tick), 2 * options.runs),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("membership", "inversion", "canaries"))
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epsilon", type=float, default=8.0, help="that private arms spend in all")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--norm", type=float, default=0.5, help="clipping norm")
    parser.add_argument("--rate", type=float, default=0.5, help="membership: sampling rate of the private arm")
    parser.add_argument("--rounds", type=int, default=4, help="membership: of 25 steps")
    parser.add_argument("--patients", type=int, default=48, help="membership: half of them in each study")
    parser.add_argument("--models", type=int, default=16, help="membership: studies, each the others' shadow model")
    parser.add_argument("--victims", type=int, default=8, help="inversion: patients in turn")
    parser.add_argument("--strangers", type=int, default=32, help="inversion: patients to compare with")
    parser.add_argument("--iterations", type=int, default=400, help="inversion: steps of the attack")
    parser.add_argument("--company", type=int, default=4, help="canaries: other patients of the site")
    parser.add_argument("--steps", type=int, default=4, help="canaries: steps of a round")
    parser.add_argument("--runs", type=int, default=400, help="canaries: rounds with and as many without")
    return parser.parse_args()


if __name__ == "__main__":
    main()
