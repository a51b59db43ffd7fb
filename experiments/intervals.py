"""Intervals for the report of a simulated study, from the sites' scores of single cases, which are all on this machine.

Cases of a site that does not send exact numbers are left out: its report would say more than the site does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from client.site_config import SiteConfig
from engines.run_state import run_name
from reports.lead.intervals import Intervals, Row, row_of
from semisam_core.files import read_json_lines
from server.metrics_log import counted


def case_intervals(
    configs: Sequence[SiteConfig], run_folder: Path, local: Mapping[str, Path], classes: Sequence[str]
) -> Intervals:
    """Return the intervals of a run and of its sites' own runs, site by site and over all cases.

    Args:
        configs: the site files.
        run_folder: the federated run.
        local: site -> the run in which it trained alone.
        classes: the class names.
    """
    open_sites = [config for config in configs if config.egress.numbers == "exact"]
    federated = {config.site: _scores(config, run_folder) for config in open_sites}
    alone = {config.site: _scores(config, local[config.site]) for config in open_sites if config.site in local}
    rows: list[Row] = []
    for name in (*classes, None):
        for site in (None, *sorted(federated)):
            chosen = [site] if site is not None else sorted(federated)
            sides = [
                {
                    (each, case): {0: dice}
                    for each in chosen
                    for case, dice in dice_by_case(found.get(each, {}), name).items()
                }
                for found in (alone, federated)
            ]
            if sides[1]:
                rows.append(row_of(site, name, *sides))
    return Intervals(rows=tuple(rows))


def dice_by_case(scores: Mapping[str, Mapping[str, float]], name: str | None) -> Mapping[str, float]:
    """Return each case's Dice of a class; with None its mean over the classes."""
    if name is not None:
        return scores.get(name, {})
    cases = {case for found in scores.values() for case in found}
    return {case: fmean(found[case] for found in scores.values() if case in found) for case in cases}


def _scores(config: SiteConfig, run_folder: Path) -> dict[str, dict[str, float]]:
    """Return class -> case -> Dice in a run's selected round."""
    lines = counted(read_json_lines(run_folder / "metrics.jsonl"))
    selected = [line["round"] for line in lines if line["event"] == "selected"]
    found: dict[str, dict[str, float]] = {}
    for line in read_json_lines(config.storage.folder / "runs" / run_name(run_folder) / "scores.jsonl"):
        if selected and line["round"] == selected[-1] and "dice" in line:
            found.setdefault(line["class"], {})[line["case"]] = line["dice"]
    return found
