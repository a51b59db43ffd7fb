"""The model card: what a specialist was trained on, how good it is, what it is for, and what is not known."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch

from release.model import TrainedModel, lacking
from semisam_core.configuration import read_yaml
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.generalists.registry import generalist_spec
from semisam_core.reporting.bootstrap import estimate
from server.events import count_words
from server.metrics_log import bucketed

SCORES = ("dice", "hd95_mm")
ROLES = ("labeled", "unlabeled", "validation")
LIMITS = (
    "It was scored on the sites' own validation scans only. Other scanners, protocols and patients are untested.",
    "Scores are means over each site's scans; scores of single scans never left the sites. With fewer than about ten "
    "sites the intervals are too narrow.",
    "It always gives an answer, also for scans that show no such structure. A person must look at every segmentation.",
)
CHOSEN = "The round was chosen by these same scores, so they are a little too good."


def facts(run: Path, model: TrainedModel) -> dict[str, Any]:
    """Return the card's content for a run folder.

    Args:
        run: a study's run folder.
        model: what is exported.
    """
    plan = model.plan
    lines = read_json_lines(run / "metrics.jsonl")
    sites = {each["site"]: each for each in lines if each.get("event") == "joined"}
    generalists = plan.pseudo_labels.generalists if plan.pseudo_labels else ()
    return {
        "name": plan.task.name,
        "weights_sha256": model.sha256,
        "plan_hash": plan.hash,
        "round": model.round,
        "seed": plan.seed,
        "classes": [{"name": each.name, "values": list(each.label_values)} for each in plan.task.classes],
        "channels": list(plan.task.channels),
        "specialist": plan.specialist.name,
        "rounds": plan.training.rounds,
        "steps_per_round": plan.training.steps_per_round,
        "sites": [
            {"site": name, **{key: _count(each.get(key, 0), bucketed(each)) for key in ROLES}}
            for name, each in sorted(sites.items())
        ],
        "scores": _scores(lines, plan.class_names, model.round),
        "generalists": [_generalist(name) for name in generalists],
        "lacks": lacking(plan),
        "limits": [*LIMITS, *([] if plan.selection == "last" else [CHOSEN])],
        "intended_use": "Research on segmentation, and proposals that an expert reviews. Not a medical device.",
        "software": {
            "fedsemisam": importlib.metadata.version("fedsemisam"),
            "torch": torch.__version__,
            "monai": monai.__version__,
        },
    }


def _count(count: float, in_bucket: bool) -> int | str:
    """Return a site's number of scans, or of one in a bucket its range."""
    return count_words(count, True) if in_bucket else int(count)


def _scores(lines: Sequence[Mapping[str, Any]], classes: Sequence[str], number: int | None) -> list[dict[str, Any]]:
    """Return class, score, mean over sites with its interval, and the value of each site."""
    evaluated = [each for each in lines if each.get("event") == "evaluated"]
    if number is not None and any(each.get("round") == number for each in evaluated):
        evaluated = [each for each in evaluated if each.get("round") == number]
    found = []
    for name in classes:
        for score in SCORES:
            by_site = {str(each["site"]): float(each[key]) for each in evaluated if (key := f"{score}.{name}") in each}
            mean = estimate({(site, ""): {0: value} for site, value in by_site.items()})
            if mean is not None:
                interval = None if mean.low is None else [mean.low, mean.high]
                found.append(
                    {"class": name, "score": score, "mean": mean.mean, "interval": interval, "by_site": by_site}
                )
    return found


def _generalist(name: str) -> dict[str, Any]:
    card = generalist_spec(name).card
    return {
        "name": name,
        "licence": card.licence,
        "published_as": card.source,
        "trained_on": list(card.training_data),
        "overlaps": list(card.overlaps),
    }


def as_markdown(card: Mapping[str, Any]) -> str:
    """Return the card for people."""
    classes = ", ".join(f"{each['name']} ({'+'.join(map(str, each['values']))})" for each in card["classes"])
    lines = [
        f"# {card['name']}",
        "",
        card["intended_use"],
        "",
        f"- Segments: {classes}. Input: {', '.join(card['channels'])}.",
        f"- Network: {card['specialist']}, weights `{card['weights_sha256']}`.",
        f"- Trained for {card['rounds']} rounds of {card['steps_per_round']} steps at each site, kept after round "
        f"{card['round']}, seed {card['seed']}, plan `{card['plan_hash']}`.",
    ]
    if card["lacks"]:
        lines += ["", f"**It is not whole**: {card['lacks']}."]
    lines += ["", "## Data", "", "| site | labeled | unlabeled | validation |", "| --- | --- | --- | --- |"]
    lines += [f"| {s['site']} | {s['labeled']} | {s['unlabeled']} | {s['validation']} |" for s in card["sites"]]
    lines += ["", "## Scores", ""]
    if card["scores"]:
        lines += [
            "| class | score | mean over sites | 95 % interval over sites | by site |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(each) for each in card["scores"]]
    else:
        lines.append("None were sent by the sites. Sites withhold scores of few patients.")
    lines += ["", "## Limits", "", *(f"- {each}" for each in card["limits"])]
    lines += ["", "## Models that made pseudo-labels", ""]
    for each in card["generalists"]:
        overlaps = "; ".join(each["overlaps"]) or "none known"
        lines.append(
            f"- {each['name']} ({each['licence']}), trained on {' '.join(each['trained_on'])} Benchmarks that it may "
            f"have seen: {overlaps}."
        )
    lines += [] if card["generalists"] else ["None."]
    versions = ", ".join(f"{name} {version}" for name, version in card["software"].items())
    return "\n".join([*lines, "", f"Made with {versions}.", ""])


def _row(each: Mapping[str, Any]) -> str:
    interval = "" if each["interval"] is None else "{:.3f} to {:.3f}".format(*each["interval"])
    sites = ", ".join(f"{site} {value:.3f}" for site, value in sorted(each["by_site"].items()))
    return f"| {each['class']} | {each['score']} | {each['mean']:.3f} | {interval} | {sites} |"


def check_run(run: Path) -> None:
    """Check that a folder is a study's run folder that has ended.

    Raises:
        ConfigError: it is none, or the study has not ended.
    """
    status = run / "status.json"
    if not status.is_file():
        raise ConfigError(f"{run}: no run folder of a study is here (status.json is missing).")
    state = json.loads(status.read_text(encoding="utf-8")).get("state")
    if state != "completed":
        raise ConfigError(f"{run}: the study is {state}; a model is exported once it is completed.")
    read_yaml(run / "plan.yaml")
