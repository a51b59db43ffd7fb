"""Does a useless generalist harm the specialist? SAM with random weights, compared with training without generalists.

python benchmarks/random_generalist.py --data la-sites --plan site_configs/left-atrium/plan.yaml --work random

Runs `semisam compare` of federated-regularizer (baseline) and federated-semisam, whose only generalist has random
weights: its masks are confident blots that differ between scans and boxes. `--gates plan` uses the plan's gates. With
`--gates open` there are none, and only the confidence-aware loss protects. A stopped run resumes when started again. It
takes as long as any comparison with the same plan; encoding a slice takes some 20 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from segment_anything import modeling
from torch import Tensor, nn

from client.site_config import inventory, load_site_folder
from experiments.comparison.compare import RECORD, Comparison, Request, definition_changes
from experiments.comparison.jobs import Job
from experiments.comparison.runner import ChildRunner
from semisam_core.data.scans import load_scan
from semisam_core.evaluation import dice_of
from semisam_core.files import read_json_lines, write_atomically
from semisam_core.generalists import Generalist, Prompts, SliceBox, load_generalist
from semisam_core.generalists.cards import SAM
from semisam_core.plan import Plan, load_plan
from semisam_core.pseudo_labels.policy import policy_of
from semisam_core.pseudo_labels.views import AXES, View

BASELINE, ARM = "federated-regularizer", "federated-semisam"
LIMIT = 0.02
SIDE, PATCH, WIDTH, DEPTH, HEADS, PROMPT_WIDTH = 256, 16, 128, 4, 4, 64
NOISE = 0.2  # added to every parameter; with the usual initialisation all boxes get nearly the same answer
SURENESS = 5.0  # standard deviation of a mask's logits, about that of trained models
FILLED = (0.2, 0.8)  # the share of a slice that masks may fill on average
ALIKE = 0.95  # two answers with a higher Dice than this count as the same
DRAWS = 100
PROBED = 4
BOXES = ((0.3, 0.3, 0.6, 0.6), (0.5, 0.2, 0.7, 0.4))  # shares of the slice
OPEN = (
    "minimum_volume_ml=0",
    "maximum_volume_ml=1000000",
    "minimum_agreement=0",
    "minimum_quality=0",
    "minimum_confidence=0",
)


def main() -> None:
    """Make the generalist, compare, and print the report and how many pseudo-labels passed the gates."""
    arguments = _arguments()
    torch.set_num_threads(1)
    assignments = [*arguments.set, f"pseudo_labels.generalists=[{SAM.name}]"]
    if arguments.gates == "open":
        assignments += [f"pseudo_labels.gates.{each}" for each in (*OPEN, "volume_factor=null")]
    plan = load_plan(arguments.plan, assignments).as_generalists_see
    work = arguments.work.resolve()
    weights = work / "random-sam.pth"
    probe = _Probe(arguments.data, plan)
    if not weights.exists():
        _write_generalist(weights, probe)
    probe.show(load_generalist(SAM.name, torch.device("cpu"), weights, _sha256(weights)))
    _write_sites(arguments.data, work, weights)
    out = work / f"comparison-gates-{arguments.gates}"
    changes = definition_changes(f"{BASELINE},{ARM}", BASELINE, arguments.seeds, arguments.labeled, False, "in-process")
    request = Request(arguments.plan, work / "sites", out, assignments, None, changes, (out / RECORD).exists())
    console = Console(width=160)
    comparison = Comparison.prepare(request, console)
    completed = comparison.execute(ChildRunner(console))
    for job in comparison.jobs:
        if job.arm.name == ARM:
            _show_gates(job, plan)
    _show_harm(out)
    if not completed:
        raise SystemExit("some runs did not complete; start this again to resume them")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", "--sites", type=Path, required=True, help="folder of site files")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for all output, including the sites' storage")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--labeled", action="append", help="labels per site, as for `semisam compare`; may be repeated")
    parser.add_argument("--gates", choices=("plan", "open"), default="plan")
    parser.add_argument("--set", action="append", default=[], help="change of the plan, key=value; may be repeated")
    return parser.parse_args()


def _random_network(seed: int) -> Any:
    grid = SIDE // PATCH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = modeling.Sam(
            modeling.ImageEncoderViT(
                img_size=SIDE,
                patch_size=PATCH,
                embed_dim=WIDTH,
                depth=DEPTH,
                num_heads=HEADS,
                out_chans=PROMPT_WIDTH,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                global_attn_indexes=tuple(range(DEPTH)),
            ),
            modeling.PromptEncoder(
                embed_dim=PROMPT_WIDTH,
                image_embedding_size=(grid, grid),
                input_image_size=(SIDE, SIDE),
                mask_in_chans=16,
            ),
            modeling.MaskDecoder(
                transformer_dim=PROMPT_WIDTH,
                transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=PROMPT_WIDTH, num_heads=8, mlp_dim=128),
                iou_head_hidden_dim=PROMPT_WIDTH,
            ),
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(NOISE * torch.randn(parameter.shape))
    return network


class _Probe:
    """A few scans on which a generalist is prompted with the same boxes on the middle slice."""

    def __init__(self, sites: Path, plan: Plan) -> None:
        """Load the scans.

        Args:
            sites: folder of site files.
            plan: on the grid on which generalists see scans.
        """
        self._step_mm = policy_of(plan).prompting.slice_step_mm
        self._planes: tuple[str, ...] = policy_of(plan).prompting.planes
        self._scans: list[dict[str, View]] = []
        for config in load_site_folder(sites)[:PROBED]:
            case = inventory(config, plan.model_copy(update={"pseudo_labels": None})).cases[0]
            volume = load_scan(case, plan).image[0]
            planes = {*self._planes, "axial"}
            views: dict[str, View] = {plane: View(volume, plan.data.spacing_mm, AXES[plane]) for plane in planes}
            self._scans.append(views)

    def logits(self, generalist: Generalist) -> list[list[Tensor]]:
        """Return the answers to the boxes for each scan, (H, W) each."""
        found = []
        for scan in self._scans:
            view = scan["axial"]
            height, width, depth = view.grid.shape
            middle = depth // 2
            embedded = generalist.embed(view.volume, view.grid, [middle])
            answers = []
            for top, left, bottom, right in BOXES:
                box = SliceBox(middle, (top * height, left * width, bottom * height, right * width))
                answer = generalist.segment(embedded, Prompts((box,)), view.grid).probability[:, :, middle]
                answers.append(torch.logit(answer.double(), eps=1e-6))
            found.append(answers)
        return found

    def show(self, generalist: Generalist) -> None:
        """Print statistics of the answers and how long encoding takes.

        Raises:
            SystemExit: the answers are all the same, empty or full.
        """
        logits = self.logits(generalist)
        shares = [float((each > 0).double().mean()) for answers in logits for each in answers]
        boxes, scans = _overlaps(logits)
        print(
            f"random SAM: masks fill {min(shares):.2f} to {max(shares):.2f} of a slice; Dice between two boxes on a "
            f"slice up to {max(boxes):.2f}, between scans up to {max(scans, default=0.0):.2f}",
            flush=True,
        )
        if not _usable(logits):
            raise SystemExit("these answers are all the same, empty or full, and would show nothing")
        print(self._cost(generalist), flush=True)

    def _cost(self, generalist: Generalist) -> str:
        views = [self._scans[0][plane] for plane in self._planes]
        encoded = [range(0, view.grid.shape[2], view.slice_step(self._step_mm)) for view in views]
        start = time.process_time()  # wall-clock time means little on a busy machine
        for view, slices in zip(views, encoded, strict=True):
            generalist.embed(view.volume, view.grid, slices)
        seconds, count = time.process_time() - start, sum(len(slices) for slices in encoded)
        each = f"encoding takes {1000 * seconds / count:.0f} ms of one core per slice"
        return f"{each}, at most {seconds:.1f} s per scan ({count} slices)"


def _overlaps(logits: Sequence[Sequence[Tensor]]) -> tuple[list[float], list[float]]:
    """Return the Dice between answers to two boxes on one slice, and to one box on slices of two scans."""
    boxes = [dice_of(one > 0, other > 0) for one, other in logits]
    scans = []
    for one, other in itertools.combinations([answers[0] for answers in logits], 2):
        rows, columns = (min(sides) for sides in zip(one.shape, other.shape, strict=True))
        scans.append(dice_of(one[:rows, :columns] > 0, other[:rows, :columns] > 0))
    return boxes, scans


def _usable(logits: Sequence[Sequence[Tensor]]) -> bool:
    shares = [float((each > 0).double().mean()) for answers in logits for each in answers]
    boxes, scans = _overlaps(logits)
    return (
        FILLED[0] <= sum(shares) / len(shares) <= FILLED[1]
        and min(shares) > 0.02
        and max(shares) < 0.98
        and max([*boxes, *scans]) < ALIKE
    )


def _write_generalist(path: Path, probe: _Probe) -> None:
    """Write the first of a fixed series of random networks whose answers are not all the same, empty or full."""
    trial = path.with_name("trial.pth")
    for seed in range(DRAWS):
        network = _random_network(seed)
        logits = probe.logits(_saved(network, trial))
        spread = math.sqrt(sum(float(each.var()) for answers in logits for each in answers) / (2 * len(logits)))
        if spread > 0 and _usable(logits):
            with torch.no_grad():
                for head in network.mask_decoder.output_hypernetworks_mlps:
                    for parameter in head.layers[-1].parameters():
                        parameter.mul_(SURENESS / spread)  # a mask's logits are linear in these
            _saved(network, path)
            trial.unlink()
            return
    raise SystemExit(f"the answers of all {DRAWS} random networks were all the same, empty or full")


def _saved(network: Any, path: Path) -> Generalist:
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    write_atomically(path, content.getvalue())
    return load_generalist(SAM.name, torch.device("cpu"), path, _sha256(path))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_sites(source: Path, work: Path, weights: Path) -> None:
    """Write copies of the site files with this generalist only and with separate storage."""
    for config in load_site_folder(source):
        content = config.model_dump(mode="json")
        content["generalists"] = {SAM.name: {"weights": str(weights), "sha256": _sha256(weights)}}
        content["storage"]["folder"] = str(work / "storage" / config.site)
        text = yaml.safe_dump(content, sort_keys=False)
        write_atomically(work / "sites" / f"{config.site}.yaml", text.encode())


def _show_gates(job: Job, plan: Plan) -> None:
    """Print how many pairs of scan and class were accepted, at each refresh of pseudo-labels and in total."""
    made: dict[tuple[int, str], dict[str, Any]] = {}  # a repeated round is recorded again
    for line in read_json_lines(job.folder / "metrics.jsonl"):
        if line["event"] == "trained" and policy_of(plan).due(int(line["round"])):
            made[int(line["round"]), line["site"]] = line
    total: Counter[str] = Counter()
    print(f"{job.title}:")
    for number in sorted({number for number, _ in made}):
        counts: Counter[str] = Counter()
        for (other, _), line in made.items():
            if other == number:
                counts.update({name: int(line[name]) for name in line if name.split(".")[0] in ("accepted", "gated")})
        print(f"  round {number}: {_counted(counts)}")
        total.update(counts)
    print(f"  in total: {_counted(total)}", flush=True)
    if total and not total["accepted"]:
        print("  nothing passed the gates, so the loss had nothing to protect from")


def _counted(counts: Counter[str]) -> str:
    pairs = counts["accepted"] + counts["gated"]
    share = f" ({counts['accepted'] / pairs:.2f})" if pairs else ""
    reasons = [f"{name.partition('.')[2]} {count}" for name, count in sorted(counts.items()) if "." in name and count]
    return f"{counts['accepted']} of {pairs} accepted{share}, {counts['gated']} gated" + (
        f": {', '.join(reasons)}" if reasons else ""
    )


def _show_harm(out: Path) -> None:
    """Print what the specialist loses compared with training without the generalist, per label count and class."""
    for arm in json.loads((out / "results.json").read_text(encoding="utf-8"))["arms"]:
        for scored in arm["classes"]:
            if (difference := scored["dice_difference"]) is None:
                continue
            lost = 0.0 - difference["mean"]
            known = difference["low"] is not None
            interval = f" [{0.0 - difference['high']:.3f}, {0.0 - difference['low']:.3f}]" if known else ""
            print(
                f"labels {arm['labeled']}, {scored['target']}: {arm['arm']} loses {lost:.3f}{interval} Dice against "
                f"{BASELINE}; its mean is {'within' if lost <= LIMIT else 'above'} {LIMIT}",
                flush=True,
            )


if __name__ == "__main__":
    main()
