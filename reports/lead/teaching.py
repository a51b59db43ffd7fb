"""What taught the specialist at each site: labels, pseudo-labels and why some were refused, terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reports.charts import BarChart, bar_chart
from reports.lead.record import RunRecord, SiteRecord
from server.events import count_words
from server.metrics_log import TERMS, gradients

WITHHELD = "withheld"
LABEL_COLUMNS = ("site", "labeled", "unlabeled", "validation", "not usable", "generalists")
HIDDEN_COLUMNS = ("site", "structure", "scans", "Dice prompting", "Dice pseudo-label", "Dice final")


@dataclass(frozen=True)
class Series:
    """Numbers over rounds: charts of the sites that sent them, what is said of the others, and all numbers."""

    charts: tuple[BarChart, ...]
    without: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def labels_used(record: RunRecord) -> list[tuple[str, ...]]:
    """Return each site's scans by role; see `LABEL_COLUMNS`."""
    return [
        (
            site.name,
            *(_count(site.joined, key, site.coarse) for key in ("labeled", "unlabeled", "validation", "quarantined")),
            _count(site.joined, "generalists", False),
        )
        for site in record.sites
    ]


def pseudo_labels(record: RunRecord) -> Series:
    """Return accepted and refused pseudo-labels of each round, pairs of scan and structure."""
    charts, without, rows = [], [], []
    for site in record.sites:
        told = {n: line for n, line in site.trained.items() if "accepted" in line}
        if not told:
            without.append((site.name, WITHHELD if site.trained else "did not train"))
        columns = {n: (float(line["accepted"]), float(line.get("gated", 0))) for n, line in told.items()}
        if told and any(sum(each) for each in columns.values()):
            first, last = min(columns), max(columns)
            alt = f"{site.name}, pseudo-labels by round. {_said(site, first)}; {_said(site, last)}."
            charts.append(bar_chart(site.name, alt, columns, record.plan.training.rounds, shares=False))
        elif told:
            without.append((site.name, "none in any round"))
        rows += [_pseudo_row(site, n) for n in sorted(site.trained)]
    columns_said = ("site", "round", "accepted", "refused", "refused, by reason", "mean confidence")
    return Series(tuple(charts), tuple(without), columns_said, tuple(rows))


def loss_terms(record: RunRecord) -> Series:
    """Return each term's share of the gradients, by site and round."""
    charts, without, rows = [], [], []
    for site in record.sites:
        unsaid = WITHHELD if site.coarse or record.plan.privacy is not None else "-"
        shares = {n: _shares(site, line) for n, line in site.trained.items()}
        known = {n: each for n, each in shares.items() if isinstance(each, tuple)}
        if known:
            last = max(known)
            alt = f"{site.name}, share of each term of the loss in the gradients. Round {last}: " + ", ".join(
                f"{term} {share:.0%}" for term, share in zip(TERMS, known[last], strict=True)
            )
            charts.append(bar_chart(site.name, alt, known, record.plan.training.rounds, shares=True))
        else:
            without.append((site.name, next((str(each) for each in shares.values()), "did not train")))
        rows += [
            (site.name, str(n), *(f"{share:.0%}" for share in found), *_losses(site.trained[n], unsaid))
            if isinstance(found := shares[n], tuple)
            else (site.name, str(n), found, found, found, *_losses(site.trained[n], unsaid))
            for n in sorted(shares)
        ]
    columns = ("site", "round", *(f"{term}, share" for term in TERMS), *(f"{term}, loss" for term in TERMS))
    return Series(tuple(charts), tuple(without), columns, tuple(rows))


def unlabeled_scores(record: RunRecord) -> list[tuple[str, ...]]:
    """Return scores on scans that were trained on without their labels; see `HIDDEN_COLUMNS`."""
    coarse = {site.name for site in record.sites if site.coarse}
    return [
        (
            str(each["site"]),
            str(each["target"]),
            *(
                [WITHHELD] * 4
                if each["site"] in coarse
                else [str(each["unlabeled_scored"]), *(_dice(each.get(key)) for key in _HIDDEN)]
            ),
        )
        for each in record.results
        if each.get("unlabeled_scored")
    ]


_HIDDEN = ("prompting_dice", "pseudo_label_dice", "unlabeled_dice")


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(line: Mapping[str, Any], key: str, coarse: bool) -> str:
    return count_words(line[key], coarse) if key in line else WITHHELD


def _reasons(site: SiteRecord, number: int) -> str:
    gates = {key.partition(".")[2]: count for key, count in site.trained[number].items() if key.startswith("gated.")}
    said = [f"{reason} {count_words(count, site.coarse)}" for reason, count in sorted(gates.items()) if count]
    return ", ".join(said) or "-"


def _said(site: SiteRecord, number: int) -> str:
    line = site.trained[number]
    refused = count_words(line.get("gated", 0), site.coarse)
    return f"Round {number}: {count_words(line['accepted'], site.coarse)} accepted, {refused} refused"


def _pseudo_row(site: SiteRecord, number: int) -> tuple[str, ...]:
    line = site.trained[number]
    if "accepted" not in line:
        return (site.name, str(number), WITHHELD, WITHHELD, WITHHELD, WITHHELD)
    confidence = f"{line['confidence']:.2f}" if "confidence" in line else WITHHELD
    counts = [_count(line, key, site.coarse) for key in ("accepted", "gated")]
    return (site.name, str(number), *counts, _reasons(site, number), confidence)


def _shares(site: SiteRecord, line: Mapping[str, Any]) -> tuple[float, ...] | str:
    """Return the terms' shares; a word where they are not known: without a withheld term they would be of less."""
    norms = [float(line.get(f"gradient.{term}", 0.0)) for term in TERMS]
    if not any(f"gradient.{term}" in line for term in TERMS):
        return WITHHELD if line.get("steps", 0) else "took no step"
    if gradients(line, site.coarse) is None:
        return WITHHELD
    total = sum(norms)
    return tuple(norm / total for norm in norms) if total > 0 else "no gradient"


def _losses(line: Mapping[str, Any], unsaid: str) -> tuple[str, ...]:
    return tuple(f"{line[key]:.4g}" if (key := f"loss.{term}") in line else unsaid for term in TERMS)
