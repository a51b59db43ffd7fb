"""How much damage one of five hospitals can do under each rule by flipping the sign of its update.

python benchmarks/poisoned_site.py                 about 8 minutes on a core of its own

Phantom hospitals, supervised only. The poisoned site trains honestly on good labels and sends
theta - k (theta_k - theta) instead of theta_k. Dice is the mean over validation scans of the four honest hospitals.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import yaml
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp

from client.app import app as honest_app
from engines.in_process_grid import run_in_process
from semisam_core.contract import SPECIALIST_RECORD
from semisam_core.data.phantom import DEMO_SCANNERS, Scanner, write_phantom_site
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan, load_plan
from server.app import app as server_app

PLAN = Path(__file__).resolve().parents[1] / "site_configs" / "phantom" / "plan.yaml"
ALL_THAT_IS_PREDICTED = "task.classes=[{name: liver, value: 1}]"  # islands count in the score as well
SCANNERS = {
    **DEMO_SCANNERS,
    "west": Scanner((3.4, 3.4, 4.4), "LAS", gain=600.0, offset=20.0, gamma=1.15, bias=0.30, noise=0.055),
    "centre": Scanner((3.0, 3.0, 4.0), "RAS", gain=1200.0, offset=0.0, gamma=0.90, bias=0.35, noise=0.050),
}
POISONED = "west"
CASES = {"labeled": 3, "validation": 2}
RULES = ("weighted-mean", "median", "trimmed-mean", "multi-krum")
LIMIT = 0.02


class _PoisonedApp(ClientApp):
    """The honest app, except for what the poisoned site sends after training."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def __call__(self, message: Message, context: Context) -> Message:
        """Reply as the honest app does, but with the poisoned site's change flipped and scaled."""
        reply = honest_app(message, context)
        mine = Path(str(context.node_config["site-config"])).stem == POISONED
        if mine and self._factor and message.metadata.message_type == MessageType.TRAIN and not reply.has_error():
            start, sent = (each.content.array_records[SPECIALIST_RECORD] for each in (message, reply))
            reply.content[SPECIALIST_RECORD] = ArrayRecord(
                {
                    name: Array(start[name].numpy() - self._factor * (array.numpy() - start[name].numpy()))
                    for name, array in sent.items()
                }
            )
        return reply


def main() -> None:
    """Print the Dice under each rule, without and with the attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rule", choices=RULES, action="append", help="one rule; all by default")
    parser.add_argument("--attack", type=float, action="append", help="k; 5 by default")
    arguments = parser.parse_args()
    attacks = [0.0, *(arguments.attack or [5.0])]
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sites = [_write_site(Path(folder), number, name) for number, name in enumerate(sorted(SCANNERS))]
        head = "  ".join(f"{'honest' if not k else f'flipped x {k:g}':>14s}" for k in attacks)
        print(f"Dice, {arguments.rounds} rounds of {arguments.steps} steps\n{'':14s}{head}", flush=True)
        for rule in arguments.rule or RULES:
            plan = _plan(rule, arguments.rounds, arguments.steps)
            scores = [_score(Path(folder) / f"{rule}-{k:g}", plan, sites, k) for k in attacks]
            print(f"{rule:14s}" + "  ".join(f"{score:14.3f}" for score in scores), flush=True)
            lost = scores[0] - min(scores[1:])
            print(f"{'':14s}loses at most {lost:.3f}, {'within' if lost <= LIMIT else 'above'} {LIMIT}", flush=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


def _plan(rule: str, rounds: int, steps: int) -> Plan:
    changes = (
        ALL_THAT_IS_PREDICTED,
        "specialist.arguments.channels=[8, 16, 32, 64]",
        "data.spacing_mm=[5.0, 5.0, 6.0]",
        "data.patch=[32, 32, 16]",
        "regularizer.name=none",
        "pseudo_labels=null",
        f"training.rounds={rounds}",
        f"training.steps_per_round={steps}",
        "training.optimizer.learning_rate=0.006",
        "training.augmentation.affine_probability=0",
        f"evaluation.every_rounds={rounds}",
        f"aggregation.rule={rule}",
        f"aggregation.minimum_sites={len(SCANNERS)}",
        "aggregation.weights=samples",
    )
    return load_plan(PLAN, list(changes))


def _write_site(folder: Path, number: int, name: str) -> Path:
    write_phantom_site(folder / "data" / name, SCANNERS[name], sum(CASES.values()), 70 + number, name)
    content = {
        "version": 1,
        "site": name,
        "data": {
            "images": str(folder / "data" / name / "images"),
            "labels": str(folder / "data" / name / "labels"),
            "labeled": "all",
            "validation": [f"{name}-{k:02d}" for k in range(CASES["labeled"], sum(CASES.values()))],
        },
        "generalists": {},
        "device": "cpu",
        "threads": 1,
        "storage": {"folder": str(folder / "storage" / name)},
        "egress": {"numbers": "exact"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _score(folder: Path, plan: Plan, sites: list[Path], factor: float) -> float:
    """Run a study and return the mean Dice over the honest sites' validation scans."""
    folder.mkdir()
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8")
    config: dict[str, str | int] = {"plan": str(file), "num-sites": len(sites), "run-folder": str(folder / "run")}
    run_in_process(server_app, _PoisonedApp(factor), [{"site-config": str(path)} for path in sites], config)
    lines = read_json_lines(folder / "run" / "metrics.jsonl")
    final = [line for line in lines if line["event"] == "evaluated" and line["final"] and line["site"] != POISONED]
    if len(final) != len(sites) - 1:
        raise ValueError(f"{len(final)} honest sites were scored, {len(sites) - 1} expected")
    return sum(float(line["dice.liver"]) for line in final) / len(final)


if __name__ == "__main__":
    main()
