"""The results of a run, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.tables import FittingTable
from semisam_core.files import read_json_lines
from server.events import count_words
from server.metrics_log import bucketed, counted

UNLABELED = (
    "Unlabeled: scans whose labels the study never saw; the specialist that prompted the last pseudo-labels and those "
    "labels, where accepted, and the final specialist on all."
)


@dataclass(frozen=True)
class SiteResult:
    """One row of the table: one site, one class. None where nothing was measured.

    Attributes:
        unlabeled_scored: scans used as unlabeled whose labels are known here; see `experiments/unlabeled.py`.
        prompting_dice: on those of them with a pseudo-label, of the specialist that prompted it.
        pseudo_label_dice: on the same, of the pseudo-label.
        unlabeled_dice: on all of them, of the final specialist.
        bucketed: whether the site's counts are the lowest of a bucket; its scores are then withheld if of few patients.
    """

    site: str
    target: str
    labeled: int
    unlabeled: int
    validation: int
    quarantined: int
    accepted: int
    gated: int
    local_dice: float | None
    local_hd95_mm: float | None
    federated_dice: float | None
    federated_hd95_mm: float | None
    missing_distances: int
    unlabeled_scored: int = 0
    prompting_dice: float | None = None
    pseudo_label_dice: float | None = None
    unlabeled_dice: float | None = None
    bucketed: bool = False


def collect(run_folder: Path, local_folders: Mapping[str, Path], classes: Sequence[str]) -> list[SiteResult]:
    """Collect the results of a run and its local-only arms, by site and class."""
    lines = counted(read_json_lines(run_folder / "metrics.jsonl"))
    joined = {line["site"]: line for line in lines if line["event"] in ("joined", "rejoined")}
    trained = {line["site"]: line for line in lines if line["event"] == "trained"}
    scored = scores_of(lines)
    results = []
    for site in sorted(joined):
        local = {}
        if site in local_folders:
            local = scores_of(counted(read_json_lines(local_folders[site] / "metrics.jsonl"))).get(site, {})
        federated, last = scored.get(site, {}), trained.get(site, {})
        for name in classes:
            results.append(
                SiteResult(
                    site=site,
                    target=name,
                    labeled=int(joined[site]["labeled"]),
                    unlabeled=int(joined[site]["unlabeled"]),
                    validation=int(joined[site]["validation"]),
                    quarantined=int(joined[site]["quarantined"]),
                    accepted=int(last.get("accepted", 0)),
                    gated=int(last.get("gated", 0)),
                    local_dice=local.get(f"dice.{name}"),
                    local_hd95_mm=local.get(f"hd95_mm.{name}"),
                    federated_dice=federated.get(f"dice.{name}"),
                    federated_hd95_mm=federated.get(f"hd95_mm.{name}"),
                    missing_distances=int(federated.get(f"missing_distances.{name}", 0)),
                    bucketed=bucketed(joined[site]),
                )
            )
    return results


def scores_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each site's scores in the selected round."""
    selected = [line["round"] for line in lines if line["event"] == "selected"]
    if not selected:
        return {}
    return {
        line["site"]: dict(line) for line in lines if line["event"] == "evaluated" and line["round"] == selected[-1]
    }


def as_json(results: Sequence[SiteResult]) -> list[dict[str, Any]]:
    """Return the results as plain values."""
    return [asdict(result) for result in results]


def results_table(results: Sequence[SiteResult], title: str, chosen_by: str) -> FittingTable:
    """Return the results as a terminal shows them; scores on unlabeled scans only if there are any."""
    hidden = any(r.unlabeled_scored for r in results)
    table = FittingTable(
        "site",
        "class",
        "scans\nlabeled /\nunlabeled",
        "pseudo-labels\naccepted /\ngated",
        *(["unlabeled, Dice\nprompting / pseudo-\nlabel / final"] if hidden else []),
        "Dice\nlocal /\nfederated",
        "HD95 mm\nlocal /\nfederated",
        title=title,
        caption="Local: trained alone, supervised, same steps. Pseudo-labels: last round, all classes together. "
        f"Selected by: {chosen_by}." + (f" {UNLABELED}" if hidden else ""),
        numbers_from=2,
    )
    for r in results:
        missing = f" ({count_words(r.missing_distances, r.bucketed)} missing)" if r.missing_distances else ""
        table.add(
            r.site,
            r.target,
            f"{count_words(r.labeled, r.bucketed)} / {count_words(r.unlabeled, r.bucketed)}",
            f"{count_words(r.accepted, r.bucketed)} / {count_words(r.gated, r.bucketed)}",
            *([" / ".join(_number(each, 3) for each in _unlabeled(r))] if hidden else []),
            f"{_number(r.local_dice, 3)} / {_federated(r, r.federated_dice, 3)}",
            f"{_number(r.local_hd95_mm, 1)} / {_federated(r, r.federated_hd95_mm, 1)}{missing}",
        )
    return table


def _federated(r: SiteResult, value: float | None, digits: int) -> str:
    """Return a score; a site in buckets that scored scans and sent none withheld it."""
    return "withheld" if value is None and r.bucketed and r.validation else _number(value, digits)


def _unlabeled(r: SiteResult) -> tuple[float | None, float | None, float | None]:
    return r.prompting_dice, r.pseudo_label_dice, r.unlabeled_dice


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
