"""How the run went: what left each site, privacy, generalists and what they may have seen, faults, how to repeat it."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from reports.lead.record import RunRecord, SiteRecord
from reports.page import listed
from semisam_core.codecs import leaving_bytes
from semisam_core.contract import update_spec
from semisam_core.generalists.registry import generalist_spec
from server.events import FAULTS, describe

LEFT_COLUMNS = ("site", "replies", "numbers", "bytes of updates", "refusals")
EPSILON_COLUMNS = ("site", "private rounds", "epsilon of the last round", "epsilon in total", "delta")
FAULT_COLUMNS = ("time (UTC)", "what happened")
ABOUT_A_LINE = frozenset({"event", "time", "round", "site", "kind", "final", "counts"})
WITHHELD = "withheld"


@dataclass(frozen=True)
class Seen:
    """A generalist and what it may have seen.

    Attributes:
        name: as the plan calls it.
        licence: of its weights.
        trained_on: what it was trained on, as published.
        overlaps: benchmarks that it may have seen.
        likely: those of them that name a structure or the task of this study.
    """

    name: str
    licence: str
    trained_on: tuple[str, ...]
    overlaps: tuple[str, ...]
    likely: tuple[str, ...]


def what_left(record: RunRecord) -> list[tuple[str, ...]]:
    """Return what the server admitted from each site; see `LEFT_COLUMNS`."""
    size = leaving_bytes(record.plan)
    rows: list[tuple[str, ...]] = []
    for site in sorted(record.sites, key=lambda each: each.name):
        lines = [line for line in record.everything if line.get("site") == site.name and line["event"] in _REPLIES]
        kinds = Counter(_REPLIES[line["event"]] for line in lines)
        numbers = sum(len(line.keys() - ABOUT_A_LINE) for line in lines)
        refusals = Counter(str(line["reason"]) for line in record.everything if _refused_by(line, site.name))
        rows.append((site.name, listed(kinds), str(numbers), f"{size * kinds['update']:,}", listed(refusals)))
    return rows


def update_size(record: RunRecord) -> str:
    """Return what an update consists of, in a sentence."""
    spec = update_spec(record.plan)
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in spec.values())
    said = f"An update has {len(spec)} tensors with {size:,} bytes."
    if (codec := record.plan.aggregation.codec) is not None:
        return f"{said} Its change left with the codec {codec.name}: {leaving_bytes(record.plan):,} bytes."
    if record.plan.aggregation.secure is None:
        return said
    masked = leaving_bytes(record.plan)
    return (
        f"{said} Under secure aggregation they left as one masked vector of {masked:,} bytes, with keys and "
        "shares; the server saw the sum only."
    )


def names_of_numbers(record: RunRecord) -> list[str]:
    """Return the names of all numbers that came from sites."""
    lines = [line for line in record.everything if line["event"] in _REPLIES]
    return sorted({key for line in lines for key in line.keys() - ABOUT_A_LINE})


def epsilons(record: RunRecord) -> list[tuple[str, ...]]:
    """Return what private rounds cost the patients of each site, where the site says so; see `EPSILON_COLUMNS`."""
    if record.plan.privacy is None:
        return []
    return [_epsilon(site) for site in sorted(record.sites, key=lambda each: each.name)]


def privacy_terms(record: RunRecord) -> list[tuple[str, str]]:
    """Return the plan's terms of privacy, by name."""
    terms = []
    if (private := record.plan.privacy) is not None:
        terms += [
            ("noise multiplier", f"{private.noise_multiplier:g}"),
            ("clipping norm of a patient's gradient", f"{private.clipping_norm:g}"),
            ("share of patients drawn at each step", f"{private.sampling_rate:g}"),
            ("delta", f"{private.delta:g}"),
        ]
    summed = "yes: the server saw the sum of the updates only"
    terms.append(("secure aggregation", "no" if record.plan.aggregation.secure is None else summed))
    return terms


def generalists(record: RunRecord) -> list[Seen]:
    """Return the study's generalists with what they may have seen, from their cards."""
    policy = record.plan.pseudo_labels
    topics = {words for name in (*record.plan.class_names, record.plan.task.name) if (words := _plain(name))}
    found = []
    for name in policy.generalists if policy is not None else ():
        card = generalist_spec(name).card
        likely = tuple(each for each in card.overlaps if any(topic in _plain(each) for topic in topics))
        found.append(Seen(name, card.licence, card.training_data, card.overlaps, likely))
    return found


def faults(record: RunRecord) -> list[tuple[str, str]]:
    """Return what went wrong during the run and what was done about it; see `FAULT_COLUMNS`."""
    coarse = {site.name for site in record.sites if site.coarse}
    found = []
    for line in record.everything:
        said = describe(line, line.get("site") in coarse) if line["event"] in FAULTS else None
        if said is not None:
            found.append((_utc(line), said))
    for site, (state, reason) in sorted(record.alone_ends.items()):
        if state != "completed":
            found.append(("-", f"{site} alone did not complete ({state}): {reason}"))
    return found


def repeat(record: RunRecord) -> list[tuple[str, str]]:
    """Return what a person needs to repeat the run, by name."""
    versions = record.about.get("versions") or {}
    last = record.rounds[-1] if record.rounds else {}
    chosen = f"round {record.selected['round']}: {record.selected['by']}" if record.selected else "none yet"
    return [
        ("plan hash", record.plan.hash),
        ("seed", str(record.plan.seed)),
        ("run", str(record.about.get("run", "unknown"))),
        ("versions", ", ".join(f"{name} {each}" for name, each in versions.items()) or "not recorded"),
        ("published specialist", chosen),
        ("SHA-256 of the last round's tensors", str(last.get("sha256", "none yet"))),
        ("command", "semisam simulate --plan plan.yaml --sites <folder of the site files> --out <new folder>"),
        ("this page made by", f"fedsemisam {importlib.metadata.version('fedsemisam')}"),
    ]


def plan_text(record: RunRecord) -> str:
    """Return the whole plan as YAML."""
    return yaml.safe_dump(record.plan.model_dump(mode="json"), sort_keys=False)


def period(record: RunRecord) -> str:
    """Return from when to when the run lasted."""
    timed = [line for line in record.everything if "time" in line]
    return f"{_utc(timed[0])} to {_utc(timed[-1])} UTC" if timed else "not started"


_REPLIES = {"joined": "join", "rejoined": "join", "trained": "update", "evaluated": "scores"}


def _refused_by(line: Mapping[str, Any], site: str) -> bool:
    return line["event"] == "refused" and line.get("site") == site


def _epsilon(site: SiteRecord) -> tuple[str, ...]:
    told = [line for _, line in sorted(site.trained.items()) if "epsilon.total" in line]
    if not told:
        return (site.name, str(len(site.trained)), WITHHELD, WITHHELD, WITHHELD)
    last = told[-1]
    values = (f"{last['epsilon.round']:.2f}", f"{last['epsilon.total']:.2f}", f"{last['epsilon.delta']:g}")
    return (site.name, str(len(site.trained)), *values)


def _plain(name: str) -> str:
    return name.replace("-", " ").casefold()


def _utc(line: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(line.get("time", 0))))
