"""How good masks from prototypes are before any training: one labeled scan, LiteMedSAM, left atrium.

python benchmarks/cold_start.py --data la --work cold     minutes on one core; encodes 11 slices per scan

`la` contains images/ and labels/. Each scan is the labeled one in turn; the labels of the others are used for scoring
only. Embeddings are kept in <work>/embeddings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from semisam_core.components import meaningful_components
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import Scan, load_scan
from semisam_core.evaluation import dice_of
from semisam_core.generalists import EmbeddingStore, load_generalist
from semisam_core.plan import Plan, load_plan
from semisam_core.pseudo_labels.cold_start import ColdStarter, Prototypes
from semisam_core.pseudo_labels.fusion import make_pseudo_label

PLAN = Path(__file__).resolve().parents[1] / "site_configs" / "left-atrium" / "plan.yaml"
SCANS = ("la_023", "la_030", "la_020", "la_011", "la_024")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECTION = "pseudo_labels.cold_start"
VARIANTS: dict[str, tuple[str, ...]] = {
    "1 prototype per class, no position": ("foreground_prototypes=1", "background_prototypes=1", "position_weight=0.0"),
    "8 + 32 prototypes, no position": ("position_weight=0.0",),
    "8 + 32, position 0.6 (default)": (),
    "8 + 32, position 1.0": ("position_weight=1.0",),
    "4 + 8, position 0.6": ("foreground_prototypes=4", "background_prototypes=8"),
    "8 + 32, position 0.6, temperature 0.5": ("temperature=0.5",),
}
Method = Callable[[Scan, Scan], Tensor]


def main() -> None:
    """Print a Markdown table with a row per variant and a column per labeled scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    store = EmbeddingStore(arguments.work / "embeddings", 10**11)
    scans = {name: _scan(arguments.data, name, arguments.work / "prepared") for name in SCANS}
    print("| | mean | lowest | " + " | ".join(f"from {name}" for name in SCANS) + " |\n|" + " --- |" * (3 + len(SCANS)))
    _row("the labeled mask, stretched to the scan's extent", _stretched, scans)
    for title, changes in VARIANTS.items():
        _row(title, _prototypes(_plan(*changes), store), scans)
    _row("default, then LiteMedSAM prompted with it (axial)", _prompted(_plan(), store), scans)


def _plan(*changes: str) -> Plan:
    start = [f"{SECTION}={{until_round: 2, generalist: lite-medsam}}", "pseudo_labels.prompting.planes=[axial]"]
    return load_plan(PLAN, [*start, *(f"{SECTION}.{change}" for change in changes)])


def _scan(data: Path, name: str, prepared: Path) -> Scan:
    paths = [data / kind / f"{name}.nii.gz" for kind in ("images", "labels")]
    return load_scan(Case(name, (paths[0],), paths[1], Role.LABELED), _plan(), prepared)


def _row(title: str, method: Method, scans: Mapping[str, Scan]) -> None:
    columns = []
    for labeled in scans.values():
        others = [scan for scan in scans.values() if scan.id != labeled.id]
        columns.append([dice_of(method(labeled, scan), _truth(scan)) for scan in others])
    every = [score for column in columns for score in column]
    cells = [sum(every) / len(every), min(every), *(sum(column) / len(column) for column in columns)]
    print(f"| {title} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


def _truth(scan: Scan) -> Tensor:
    if scan.label is None:
        raise ValueError(f"{scan.id} has no label to score against")
    return scan.label > 0


def _stretched(labeled: Scan, scan: Scan) -> Tensor:
    mask = _truth(labeled).float()[None, None]
    return F.interpolate(mask, size=scan.grid.shape, mode="trilinear", align_corners=False)[0, 0] > 0.5


def _rough(plan: Plan, store: EmbeddingStore) -> Method:
    starter = ColdStarter(load_generalist("lite-medsam", DEVICE), store, plan)
    learned: dict[str, Prototypes] = {}

    def method(labeled: Scan, scan: Scan) -> Tensor:
        if labeled.id not in learned:
            learned[labeled.id] = starter.learn([(labeled.image, _truth(labeled))])
        return starter.rough(scan.image, learned[labeled.id])

    return method


def _prototypes(plan: Plan, store: EmbeddingStore) -> Method:
    rough = _rough(plan, store)

    def method(labeled: Scan, scan: Scan) -> Tensor:
        mask = (rough(labeled, scan)[1] > 0.5).numpy()
        return torch.from_numpy(meaningful_components(mask, 0.3))

    return method


def _prompted(plan: Plan, store: EmbeddingStore) -> Method:
    rough = _rough(plan, store)
    generalists = [load_generalist("lite-medsam", DEVICE)]

    def method(labeled: Scan, scan: Scan) -> Tensor:
        label = make_pseudo_label(scan.image, rough(labeled, scan), generalists, store, plan)
        if label.refusals[0]:
            print(
                f"(from {labeled.id}, {scan.id} is refused: {label.refusals[0].value}, and scores 0 below)", flush=True
            )
        return label.generalist[0] > 0.5

    return method


if __name__ == "__main__":
    main()
