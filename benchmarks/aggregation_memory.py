"""Server memory during a round with 8 and 128 sites: a specialist of 30 MB, mean and median.

python benchmarks/aggregation_memory.py            about 5 minutes on one core, 4 GB of disk

Each reply is admitted, saved and released before the next one arrives; then the updates are compared and combined.
Each figure is the peak of a fresh process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from semisam_core.contract import specialist_spec, travelling, weights_sha256
from semisam_core.inference import new_specialist
from semisam_core.packing import pack
from semisam_core.plan import Plan, load_plan
from server.admission import Admitted, admit
from server.aggregation import combine, evidence_weights, votes
from server.arrays import vector_reader
from server.outliers import outliers
from server.updates import UpdateShelf

PLAN = Path(__file__).resolve().parents[1] / "site_configs" / "phantom" / "plan.yaml"
SPECIALIST = (
    "specialist.arguments={channels: [32, 64, 128, 256, 320], strides: [2, 2, 2, 2], residual_units: 1, "
    "normalization: instance}"
)
CHANGES = (SPECIALIST, "data.patch=[48, 48, 32]", "pseudo_labels=null", "regularizer.name=none")
RULES = ("weighted-mean", "median")
SITES = (8, 128)
LIMIT = 1.3


def main() -> None:
    """Print the peak memory for both numbers of sites under each rule, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=RULES, help=argparse.SUPPRESS)
    parser.add_argument("--sites", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rule is not None:
        return one_round(arguments.rule, arguments.sites)
    for rule in RULES:
        peaks = [_in_a_fresh_process(rule, sites) for sites in SITES]
        ratio = peaks[1] / peaks[0]
        kept = "within" if ratio <= LIMIT else "above"
        print(f"{rule}: {SITES[1]} sites need {ratio:.2f}x the memory of {SITES[0]}, {kept} the limit of {LIMIT}x")
    return None


def one_round(rule: str, sites: int) -> None:
    """Receive and combine one round; print the peak memory, in MB, at the end of the line."""
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
    plan = load_plan(PLAN, [*CHANGES, f"aggregation.rule={rule}", f"aggregation.minimum_sites={sites}"])
    start, base, began = travelling(plan, new_specialist(plan)), peak_mb(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shelf = UpdateShelf(Path(folder))
        for number in range(sites):
            answer = admit(
                _reply(plan, start, number), MessageType.TRAIN, 1, plan, vector_reader(specialist_spec(plan))
            )
            if not isinstance(answer, Admitted) or answer.weights is None:
                raise ValueError(f"an honest update is rejected: {answer}")
            shelf.add(answer.site, answer.weights, answer.scalars, start)
            del answer
        arrived, came = peak_mb(), time.monotonic()
        for rejected in outliers(shelf.updates, plan.aggregation.admission):
            shelf.drop(rejected.site)
        updates = shelf.updates
        shares = evidence_weights(updates, plan.aggregation, 1.0)
        combined = combine(updates, votes(updates, shares, plan.aggregation), plan.aggregation)
        size = sum(value.nbytes for value in combined.values()) / 1e6
        print(
            f"  {rule}, {len(updates)} sites of {size:.1f} MB, {weights_sha256(combined)[:8]}: "
            f"{base:.0f} MB after imports, {arrived:.0f} MB when all had arrived ({came - began:.0f} s), "
            f"combined in {time.monotonic() - came:.0f} s with a peak of {peak_mb():.0f}"
        )


def _reply(plan: Plan, start: dict[str, Tensor], number: int) -> Message:
    generator = torch.Generator().manual_seed(number)
    trained = {
        name: value.detach() + 0.01 * torch.randn(value.shape, generator=generator) for name, value in start.items()
    }
    arrays = {name: Array(each.numpy()) for name, each in pack(trained, specialist_spec(plan)).items()}
    counts: dict[str, int | float | list[int] | list[float]] = {
        "labeled": 1 + number % 5,
        "unlabeled": 0,
        "accepted": 0,
        "confidence": 0.0,
        "steps": 1,
    }
    content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        "metrics": MetricRecord(counts),
        "site": ConfigRecord({"site": f"site-{number}", "round": 1, "plan-hash": plan.hash}),
        "specialist": ArrayRecord(arrays),
    }
    return Message(RecordDict(content), reply_to=Message(RecordDict(), number + 1, MessageType.TRAIN))


def _in_a_fresh_process(rule: str, sites: int) -> float:
    command = [sys.executable, __file__, "--rule", rule, "--sites", str(sites)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stdout.rstrip()
    print(printed, flush=True)
    return float(printed.split()[-1])


def peak_mb() -> float:
    """Return this process's own peak in MB; getrusage would start from the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


if __name__ == "__main__":
    main()
