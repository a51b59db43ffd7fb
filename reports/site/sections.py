"""A site's report in numbers: scores of single cases, pseudo-labels and their sources, what left, epsilon."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from client.privacy import PrivacyReport
from reports.charts import BarChart, LineChart, bar_chart, line_chart
from reports.page import listed
from reports.site.record import CaseScore, SiteRun
from semisam_core.reporting.bootstrap import estimate

FEWEST_CASES = 5  # below, an interval says nothing
MEAN_COLUMNS = ("structure", "cases", "Dice", "HD95 mm", "no distance")
CASE_COLUMNS = ("case", "structure", "Dice", "HD95 mm", "surface Dice")
GATE_COLUMNS = ("round", "structure", "accepted", "refused", "refused, by reason")
SOURCE_COLUMNS = ("source", "round", "structure", "share", "reliability")
LEFT_COLUMNS = ("round", "what", "numbers", "bytes of tensors", "withheld", "refused")
EPSILON_COLUMNS = ("round", "noise", "sampling", "steps", "epsilon")


@dataclass(frozen=True)
class Charted:
    """Charts, and the numbers behind them."""

    charts: tuple[LineChart | BarChart, ...]
    rows: tuple[tuple[str, ...], ...]


def means(site: SiteRun) -> list[tuple[str, ...]]:
    """Return the mean scores of the last scored round by structure; see `MEAN_COLUMNS`."""
    scores = site.final_scores
    rows: list[tuple[str, ...]] = []
    for name in site.plan.class_names:
        of_class = [score for score in scores if score.target == name]
        missing = sum(score.hd95_mm is None for score in of_class)
        distances = [(score.case, score.hd95_mm) for score in of_class if score.hd95_mm is not None]
        dice = _mean(((score.case, score.dice) for score in of_class), 3)
        rows.append((name, str(len(of_class)), dice, _mean(distances, 1), str(missing)))
    return rows


def worst_cases(site: SiteRun) -> list[tuple[str, ...]]:
    """Return the scores of single cases in the last scored round, the worst first; see `CASE_COLUMNS`."""
    return [_case_row(score) for score in site.final_scores]


def learning(site: SiteRun) -> Charted:
    """Return each structure's mean Dice over rounds."""
    means_of: dict[str, dict[int, float | None]] = {name: {} for name in site.plan.class_names}
    for number in site.scored_rounds:
        for name in site.plan.class_names:
            values = [score.dice for score in site.scores_in(number) if score.target == name]
            means_of[name][number] = fmean(values) if values else None
    charts = []
    for name, series in means_of.items():
        known = {number: value for number, value in series.items() if value is not None}
        if known:
            first, last = min(known), max(known)
            alt = f"Mean Dice of {name}: {known[first]:.3f} in round {first}, {known[last]:.3f} in round {last}"
            charts.append(line_chart(name, alt, [series], site.plan.training.rounds))
    rows = [
        (str(number), *(_number(means_of[name].get(number)) for name in site.plan.class_names))
        for number in site.scored_rounds
    ]
    return Charted(tuple(charts), tuple(rows))


def gates(site: SiteRun) -> Charted:
    """Return accepted and refused pseudo-labels by round and structure."""
    last = {(line["class"], int(line["round"])): line for line in site.gates}  # a repeated round counts once
    charts = []
    for name in site.plan.class_names:
        columns = {n: (line["accepted"], line["gated"]) for (target, n), line in sorted(last.items()) if target == name}
        if columns:
            final = max(columns)
            alt = f"Pseudo-labels of {name}: round {final}, {columns[final][0]} accepted, {columns[final][1]} refused"
            charts.append(bar_chart(name, alt, columns, site.plan.training.rounds, shares=False))
    rows = []
    for (name, number), line in sorted(last.items(), key=lambda each: (each[0][1], each[0][0])):
        reasons = {key.partition(".")[2]: count for key, count in line.items() if key.startswith("gated.")}
        rows.append((str(number), name, str(line["accepted"]), str(line["gated"]), listed(reasons)))
    return Charted(tuple(charts), tuple(rows))


def sources(site: SiteRun) -> Charted:
    """Return how much each source counted and how reliable it was, mean over the scans of a round."""
    shares: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    scores: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for line in site.sources:
        number, target = int(line["round"]), str(line["class"])
        for found, kept in ((line["weights"], shares), (line.get("reliability", {}), scores)):
            for source, value in found.items():
                kept[source, number, target].append(float(value))
    names = sorted({source for source, _, _ in shares})
    charts = []
    for name in names:
        over = {n for source, n, _ in shares if source == name}
        share, score = ({n: _over(kept, name, n) for n in over} for kept in (shares, scores))
        final = max(over)
        alt = f"{name}: share {_number(share[final])}, reliability {_number(score[final])} in round {final}"
        charts.append(line_chart(name, alt, [share, score], site.plan.training.rounds))
    rows = tuple(
        (name, str(n), target, f"{fmean(values):.3f}", _number(_mean_or_none(scores.get((name, n, target), ()))))
        for (name, n, target), values in sorted(shares.items())
    )
    return Charted(tuple(charts), rows)


def what_left(site: SiteRun) -> list[tuple[str, ...]]:
    """Return what left under this run, message by message, from the audit log; see `LEFT_COLUMNS`."""
    return [
        (
            str(entry.get("round", "")),
            str(entry.get("kind", "")),
            str(len(entry["scalars"])) if "scalars" in entry else "-",
            f"{int(entry['bytes']):,}" if "bytes" in entry else "-",
            ", ".join(map(str, entry.get("withheld", ()))) or "-",
            str(entry.get("refused", entry.get("rejected_by_the_server", "-"))),
        )
        for entry in site.audit
    ]


def left_in_total(site: SiteRun) -> str:
    """Return what left in total, in a sentence."""
    replies = Counter(str(entry["kind"]) for entry in site.audit if "scalars" in entry)
    size = sum(int(entry.get("bytes", 0)) for entry in site.audit)
    numbers = sum(len(entry.get("scalars", ())) for entry in site.audit)
    return f"{listed(replies)}: {numbers} numbers and {size:,} bytes of tensors."


def epsilons(site: SiteRun, ledger: PrivacyReport | None) -> list[tuple[str, ...]]:
    """Return what this run's private rounds cost the patients; see `EPSILON_COLUMNS`."""
    return [
        (
            str(booking.round),
            f"{booking.noise_multiplier:g}",
            f"{booking.sampling_rate:g}",
            str(booking.steps),
            f"{cost.value:.2f}",
        )
        for booking, cost in (ledger.rounds if ledger is not None else ())
        if booking.run == site.run
    ]


def _case_row(score: CaseScore) -> tuple[str, ...]:
    distance = "no distance" if score.hd95_mm is None else f"{score.hd95_mm:.1f}"
    return (score.case, score.target, f"{score.dice:.3f}", distance, _number(score.surface_dice))


def _mean(values: Iterable[tuple[str, float]], digits: int) -> str:
    found = estimate({("", case): {0: value} for case, value in values})
    if found is None:
        return "-"
    if found.cases < FEWEST_CASES or found.low is None or found.high is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _over(kept: dict[tuple[str, int, str], list[float]], name: str, number: int) -> float | None:
    values = [value for (source, n, _), found in kept.items() if (source, n) == (name, number) for value in found]
    return _mean_or_none(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
