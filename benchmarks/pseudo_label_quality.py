"""What each lever adds to pseudo-labels: Dice with true boxes, and with boxes from specialists of increasing strength.

python benchmarks/pseudo_label_quality.py --data la --work quality     hours on two cores; resumes where it stopped

`la` contains images/, labels/ and sites.csv (case, site, split). Specialists are trained on scans taken from all sites
in turn. Labels of the pseudo-labeled scans are used for scoring and for the column `true boxes` only.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.components import meaningful_components
from semisam_core.data.cases import Case, Role
from semisam_core.data.patches import TrainingScan
from semisam_core.data.scans import Scan, load_scan
from semisam_core.evaluation import dice_of
from semisam_core.files import save_tensors, write_json
from semisam_core.generalists import EmbeddingStore, load_generalist
from semisam_core.inference import new_specialist, predict
from semisam_core.plan import Plan, load_plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabels
from semisam_core.prompting import Refusal, find_region
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput, weighted_moments
from semisam_core.pseudo_labels.fusion import fuse_with_teacher
from semisam_core.training import LocalRound, new_teacher, train_round

PLAN = Path(__file__).resolve().parents[1] / "site_configs" / "left-atrium" / "plan.yaml"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = {
    "true boxes": None,
    "1 scan, 200 steps": (1, 200),
    "1 scan": (1, 600),
    "4 scans": (4, 600),
    "16 scans": (16, 600),
}
UNLABELED = slice(16, 28)
NAIVE = {"margins_mm": (0.0,), "smooth_slices": 1, "slice_step_mm": 2.5, "planes": ("axial",)}
SMOOTH_BOXES = NAIVE | {"smooth_slices": 5}
JITTERED = SMOOTH_BOXES | {"margins_mm": (-2.5, 0.0, 2.5)}
THREE_PLANES = SMOOTH_BOXES | {"slice_step_mm": 5.0, "planes": ("axial", "coronal", "sagittal")}
FACTOR = 1.5
CHOSEN = "three planes, a slice every 5 mm (default)"
LEVERS: dict[
    str, tuple[dict[str, object], float]
] = {  # prompting settings, sigma of the smoothing of answers along the slices
    "one box per component and slice": (NAIVE, 0.0),
    "boxes smoothed along the slices": (SMOOTH_BOXES, 0.0),
    "answers smoothed as well": (SMOOTH_BOXES, 1.0),
    "and three margins averaged": (JITTERED, 1.0),
    CHOSEN: (THREE_PLANES, 1.0),
}
FUSED = (
    "components judged in 3D",
    "fused, half and half",
    "fused by agreement (default)",
    "voxels right, all",
    "voxels right where planes agree",
    "voxels right where exp(-U) > 0.5",
    "share of voxels with exp(-U) > 0.5",
)


def main() -> None:
    """Fill the table, one scan and column at a time, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = _Study(arguments.data, arguments.work)
    for column in COLUMNS:
        for case in study.order[UNLABELED]:
            study.row(column, case)
    _print(study)


class _Study:
    """The scans, specialists and results in the work folder."""

    def __init__(self, data: Path, work: Path) -> None:
        self._data, self._work = data, work
        self.plan = load_plan(PLAN, ["regularizer.name=none"])
        sites: dict[str, list[str]] = {}
        with (data / "sites.csv").open(newline="") as table:
            for line in csv.DictReader(table):
                if line["split"] == "train":
                    sites.setdefault(line["site"], []).append(line["case"])
        self.order = [case for turn in zip(*(sites[site] for site in sorted(sites)), strict=False) for case in turn]
        self._store = EmbeddingStore(work / "embeddings", 10**11)
        self._teachers: dict[str, torch.nn.Module] = {}

    def row(self, column: str, case: str) -> dict[str, float]:
        """Return the scores of one scan for one column; computed once, then kept on disk."""
        path = self._work / "rows" / f"{column.replace(' ', '-').replace(',', '')}-{case}.json"
        if path.exists():
            kept: dict[str, float] = json.loads(path.read_text())
            return kept
        scan = self.scan(case)
        if scan.label is None:
            raise ValueError(f"{case} has no label to score against")
        truth = scan.label > 0
        teacher = truth.float() if COLUMNS[column] is None else self._predict(column, scan)
        scores = self._measure(column, scan, truth, teacher)
        write_json(path, scores)
        print(f"{column}, {case}: {scores}", flush=True)
        return scores

    def scan(self, case: str) -> Scan:
        """Load a labeled scan on the plan's grid."""
        paths = [self._data / kind / f"{case}.nii.gz" for kind in ("images", "labels")]
        return load_scan(Case(case, (paths[0],), paths[1], Role.LABELED), self.plan, self._work / "prepared")

    def volume_ml(self, case: str) -> float:
        """Return the volume of a scan's expert mask."""
        label = self.scan(case).label
        return 0.0 if label is None else float((label > 0).sum() * math.prod(self.plan.data.spacing_mm) / 1000)

    def _predict(self, column: str, scan: Scan) -> Tensor:
        return predict(self._teacher(column), scan.image, self.plan, DEVICE)[1]

    def _teacher(self, column: str) -> torch.nn.Module:
        if column in self._teachers:
            return self._teachers[column]
        setting = COLUMNS[column]
        if setting is None:
            raise ValueError("true boxes need no specialist")
        labels, steps = setting
        path = self._work / f"teacher-{labels}-{steps}.safetensors"
        teacher = new_teacher(new_specialist(self.plan))
        if path.exists():
            teacher.load_state_dict(load_file(path))
        else:
            self._train(teacher, labels, steps)
            save_tensors(path, teacher.state_dict())
        self._teachers[column] = teacher
        return teacher

    def _train(self, teacher: torch.nn.Module, labels: int, steps: int) -> None:
        changes = ["pseudo_labels=null", "regularizer.name=none", "training.rounds=1"]
        plan = load_plan(PLAN, [*changes, f"training.steps_per_round={steps}"])
        scans = [self.scan(case) for case in self.order[:labels]]
        loaders: Sequence[Callable[[], TrainingScan]] = [
            (lambda scan=scan: TrainingScan(scan.image, scan.label)) for scan in scans
        ]
        specialist = new_specialist(plan)
        teacher.to(DEVICE)
        train_round(LocalRound(plan, specialist, teacher, loaders, [], 1, 0, DEVICE))

    def _measure(self, column: str, scan: Scan, truth: Tensor, teacher: Tensor) -> dict[str, float]:
        scores = {"specialist": dice_of(teacher > 0.5, truth)}
        for lever, (prompting, sigma) in LEVERS.items():
            policy = _policy(self.plan, prompting, sigma)
            connected = self.plan.task.classes[0].connected
            region = find_region(
                teacher, self.plan.data.spacing_mm, policy.prompting, policy.gates, connected=connected
            )
            if isinstance(region, Refusal):
                continue  # no pseudo-label for this scan; the table's last row counts those that have one
            ensemble = GeneralistEnsemble(
                scan.image[0], self.plan.data.spacing_mm, [load_generalist("lite-medsam", DEVICE)], self._store, policy
            )
            outputs = ensemble.ask(region, teacher)
            mean, variance = weighted_moments(outputs, {})
            scores[lever] = dice_of(mean > 0.5, truth)
            if lever == CHOSEN and COLUMNS[column] is not None:
                kept = torch.from_numpy(meaningful_components((mean > 0.5).numpy(), policy.prompting.component_share))
                scores["components judged in 3D"] = dice_of(kept, truth)
                agreement = dice_of(kept, torch.from_numpy(region.mask))
                scores |= _fused(teacher, mean, variance, agreement, truth, outputs, self.plan, policy)
                scores["volume"] = float(kept.sum() * math.prod(self.plan.data.spacing_mm) / 1000)
        return scores


def _policy(plan: Plan, prompting: Mapping[str, object], sigma: float) -> PseudoLabels:
    if plan.pseudo_labels is None:
        raise ValueError("the plan must have pseudo-labels")
    changed = plan.pseudo_labels.prompting.model_copy(update=dict(prompting))
    return plan.pseudo_labels.model_copy(update={"prompting": changed, "smooth_sigma_slices": sigma})


def _fused(
    teacher: Tensor,
    mean: Tensor,
    variance: Tensor,
    agreement: float,
    truth: Tensor,
    outputs: Mapping[str, GeneralistOutput],
    plan: Plan,
    policy: PseudoLabels,
) -> dict[str, float]:
    target, uncertainty = fuse_with_teacher(teacher, mean, variance, agreement, policy)
    half = policy.model_copy(update={"generalist_share": 0.5, "share_gain": 0.0})
    plain, _ = fuse_with_teacher(teacher, mean, variance, agreement, half)
    claimed = truth | (teacher > 0.05) | (mean > 0.05)
    right = (target > 0.5) == truth
    trusted = claimed & (torch.exp(-uncertainty) > 0.5)
    agreed = claimed & (torch.stack([each > 0.5 for each in next(iter(outputs.values())).maps]).float().std(0) == 0)
    return {
        "fused, half and half": dice_of(plain > 0.5, truth),
        "fused by agreement (default)": dice_of(target > 0.5, truth),
        "voxels right, all": float(right[claimed].float().mean()),
        "voxels right where planes agree": float(right[agreed].float().mean()),
        "voxels right where exp(-U) > 0.5": float(right[trusted].float().mean()),
        "share of voxels with exp(-U) > 0.5": float(trusted.sum() / claimed.sum()),
    }


def _print(study: _Study) -> None:
    """Print a Markdown table of means over scans; in brackets, over scans on which the specialist is below 0.7."""
    rows = {column: [study.row(column, case) for case in study.order[UNLABELED]] for column in COLUMNS}
    measured = {name for each in rows.values() for row in each for name in row}
    names = [name for name in ("specialist", *LEVERS, *FUSED) if name in measured]
    print("\n| | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    for name in names:
        cells = []
        for each in rows.values():
            answered = [row for row in each if len(row) > 1]
            if any(name not in row for row in answered):
                cells.append("")
                continue
            weak = [row[name] for row in answered if row["specialist"] < 0.7]
            cells.append(_mean([row[name] for row in answered]) + (f" ({_mean(weak)})" if weak else ""))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        f"| the default, kept by volume_factor {FACTOR:g} | "
        + " | ".join(_kept(study, column) for column in COLUMNS)
        + " |"
    )
    print("| scans (below 0.7) | " + " | ".join(_counts(each) for each in rows.values()) + " |")


def _kept(study: _Study, column: str) -> str:
    """Return the mean Dice of fused targets of a volume that labeled scans make plausible, and of the others."""
    setting = COLUMNS[column]
    if setting is None:
        return ""
    seen = [study.volume_ml(case) for case in study.order[: setting[0]]]
    rows = [row for row in (study.row(column, case) for case in study.order[UNLABELED]) if "volume" in row]
    plausible = [min(seen) / FACTOR <= row["volume"] <= max(seen) * FACTOR for row in rows]
    kept, gone = (
        [row["fused by agreement (default)"] for row, keep in zip(rows, plausible, strict=True) if keep is wanted]
        for wanted in (True, False)
    )
    return f"{_mean(kept)} of {len(kept)}" + (f", {_mean(gone)} of {len(gone)} gated" if gone else "")


def _counts(rows: Sequence[Mapping[str, float]]) -> str:
    answered = [row for row in rows if len(row) > 1]
    return f"{len(answered)} ({sum(row['specialist'] < 0.7 for row in answered)})"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


if __name__ == "__main__":
    main()
