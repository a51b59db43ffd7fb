"""Was it worth it: each site alone against the federation, the worst first, and how scores grew over the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from reports.charts import LineChart, PairChart, line_chart, pair_chart
from reports.charts import Value as Drawn
from reports.lead.intervals import FEWEST_CASES, Interval
from reports.lead.record import Missing, RunRecord, SiteRecord, Value
from semisam_core.reporting.bootstrap import Estimate, estimate
from server.events import count_words

COLUMNS = (
    "site",
    "structure",
    "labels",
    "Dice alone",
    "Dice federated",
    "difference",
    "HD95 mm alone",
    "HD95 mm federated",
    "no distance",
)
FEWEST_SITES = FEWEST_CASES
FEW = 10


@dataclass(frozen=True)
class Verdict:
    """The answer in a sentence: better, worse or unclear, and what it rests on."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Worth:
    """The comparison of alone and federated.

    Attributes:
        verdict: the answer.
        charts: one for each structure.
        rows: one for each site and structure, the worst first; see `COLUMNS`.
        weakest: the worst site of each structure, in a sentence.
    """

    verdict: Verdict
    charts: tuple[PairChart, ...]
    rows: tuple[tuple[str, ...], ...]
    weakest: tuple[str, ...]


@dataclass(frozen=True)
class Learning:
    """Scores over rounds: a chart for each site that sent any, the sites that sent none, and all numbers."""

    charts: tuple[LineChart, ...]
    without: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def worth(record: RunRecord) -> Worth:
    """Return the comparison of each site alone with the federation."""
    classes = record.plan.class_names
    ranked = [(name, _ranked(record, name)) for name in classes]
    charts = tuple(_pairs(name, record, sites) for name, sites in ranked if _any_score(name, sites))
    rows = tuple(_row(record, site, name) for name, sites in ranked for site in sites)
    weakest = tuple(said for name, sites in ranked if (said := _weakest(record, name, sites)))
    return Worth(verdict(record), charts, rows, weakest)


def learning(record: RunRecord) -> Learning:
    """Return the scores of all rounds."""
    classes, rounds = record.plan.class_names, record.plan.training.rounds
    charts, without, rows = [], [], []
    for site in record.sites:
        federated = {n: site.mean_dice(line, classes) for n, line in site.evaluated.items()}
        alone = {n: site.mean_dice(line, classes) for n, line in site.alone_evaluated.items()}
        series = [{n: _number_or_none(v) for n, v in each.items()} for each in (federated, alone)]
        if any(value is not None for value in series[0].values()):
            alt = f"{site.name}, mean Dice by round. Federated: {_course(federated)}."
            alt += f" Alone: {_course(alone)}." if alone else ""
            charts.append(line_chart(site.name, alt, series if alone else series[:1], rounds))
        else:
            reason = next(iter(federated.values()), Missing.UNHEARD)
            without.append((site.name, words(reason, 3)))
        for n in sorted({*federated, *alone}):
            scores = [words(site.score(site.evaluated.get(n), f"dice.{name}"), 3) for name in classes]
            own = [words(alone[n], 3) if n in alone else "-"] if record.alone else []
            rows.append((site.name, str(n), *scores, *own))
    columns = ("site", "round", *(f"Dice {name}" for name in classes), *(["mean Dice alone"] if record.alone else []))
    return Learning(tuple(charts), tuple(without), columns, tuple(rows))


def verdict(record: RunRecord) -> Verdict:
    """Return whether federating was worth it, by mean Dice, and how sure that is."""
    if not record.alone:
        return Verdict("odd", "This run trained no site alone, so it cannot say whether federating was worth it.")
    if record.selected is None:
        return Verdict("odd", "The study has not come to its end, so nothing can be compared yet.")
    gains = _gains(record)
    if not gains:
        return Verdict("odd", "No site has both scores (alone and federated), so nothing can be compared.")
    better = sum(gain > 0 for gain in gains.values())
    counted = f"The federated specialist scored higher than training alone at {better} of {len(gains)} sites"
    found, of_what = _difference(record, gains)
    if found is None:
        return Verdict(
            "odd",
            f"{counted}; mean difference in Dice {fmean(gains.values()):+.3f}. There are too few cases for an "
            "interval, so this may be chance.",
        )
    low, high = found.low or 0.0, found.high or 0.0
    said = f"{counted}; mean difference in Dice {found.mean:+.3f} [{low:+.3f}, {high:+.3f}] over {of_what}."
    if found.cases < FEW:
        said += f" With fewer than {FEW}, the interval is too narrow."
    if low > 0:
        return Verdict("good", f"Federating was worth it. {said}")
    if high < 0:
        return Verdict("bad", f"Training alone was better. {said}")
    return Verdict("odd", f"Not clear, the interval includes no difference. {said}")


def words(value: Value, digits: int) -> str:
    """Return a number, or the word for why there is none."""
    return value.value if isinstance(value, Missing) else f"{value:.{digits}f}"


def _gains(record: RunRecord) -> dict[str, float]:
    """Return site -> mean difference over the structures that it scored both ways."""
    found = {}
    for site in record.sites:
        pairs = [(site.federated_score(f"dice.{n}"), site.alone_score(f"dice.{n}")) for n in record.plan.class_names]
        both = [f - a for f, a in pairs if not isinstance(f, Missing) and not isinstance(a, Missing)]
        if both:
            found[site.name] = fmean(both)
    return found


def _difference(record: RunRecord, gains: Mapping[str, float]) -> tuple[Interval | Estimate | None, str]:
    """Return the mean difference with its interval and over what it is; None without cases or sites enough."""
    over_cases = record.intervals.of(None, None).difference
    if over_cases is not None and over_cases.low is not None:
        return over_cases, f"{over_cases.cases} cases"
    if len(gains) >= FEWEST_SITES:
        return estimate({(site, ""): {0: gain} for site, gain in gains.items()}), f"{len(gains)} sites"
    return None, ""


def _ranked(record: RunRecord, name: str) -> list[SiteRecord]:
    def rank(site: SiteRecord) -> tuple[bool, float]:
        value = site.federated_score(f"dice.{name}")
        return (True, 0.0) if isinstance(value, Missing) else (False, value)

    return sorted(record.sites, key=rank)


def _pairs(name: str, record: RunRecord, sites: Sequence[SiteRecord]) -> PairChart:
    rows, said = [], []
    for site in sites:
        row = record.intervals.of(site.name, name)
        federated, alone = site.federated_score(f"dice.{name}"), site.alone_score(f"dice.{name}")
        name_said = f"{site.name}: {federated}" if isinstance(federated, Missing) else site.name
        rows.append((name_said, _drawn(federated, row.federated), _drawn(alone, row.alone)))
        said.append(f"{site.name} {words(federated, 3)}" + (f", alone {words(alone, 3)}" if record.alone else ""))
    return pair_chart(name, f"Dice of {name} by site, worst first: {'; '.join(said)}", rows)


def _drawn(value: Value, interval: Interval | None) -> Drawn | None:
    if isinstance(value, Missing):
        return None
    return Drawn(value) if interval is None else Drawn(value, interval.low, interval.high)


def _row(record: RunRecord, site: SiteRecord, name: str) -> tuple[str, ...]:
    row = record.intervals.of(site.name, name)
    dice = [site.alone_score(f"dice.{name}"), site.federated_score(f"dice.{name}")]
    distances = [site.alone_score(f"hd95_mm.{name}"), site.federated_score(f"hd95_mm.{name}")]
    missing = site.federated_score(f"missing_distances.{name}")
    return (
        site.name,
        name,
        count_words(site.joined.get("labeled", 0), site.coarse),
        _with_interval(dice[0], row.alone),
        _with_interval(dice[1], row.federated),
        _change(dice[0], dice[1], row.difference),
        *(words(value, 1) for value in distances),
        missing.value if isinstance(missing, Missing) else count_words(missing, site.coarse),
    )


def _with_interval(value: Value, interval: Interval | None) -> str:
    if isinstance(value, Missing) or interval is None or interval.low is None or interval.high is None:
        return words(value, 3)
    return f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _change(alone: Value, federated: Value, paired: Interval | None) -> str:
    if isinstance(alone, Missing) or isinstance(federated, Missing):
        return "-"
    if paired is None or paired.low is None or paired.high is None:
        return f"{federated - alone:+.3f}"
    return f"{paired.mean:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"


def _weakest(record: RunRecord, name: str, sites: Sequence[SiteRecord]) -> str:
    found = [(site, site.federated_score(f"dice.{name}")) for site in sites]
    scores = [(site, value) for site, value in found if not isinstance(value, Missing)]
    if len(scores) < 2:
        return ""
    (site, lowest), mean = scores[0], fmean(value for _, value in scores)
    said = f"{name}: {site.name} is lowest, Dice {lowest:.3f} against {mean:.3f} on average over sites"
    missing = site.federated_score(f"missing_distances.{name}")
    if not isinstance(missing, Missing) and missing > 0:
        said += f"; in {count_words(missing, site.coarse)} of its cases prediction or label is empty"
    return f"{said}."


def _any_score(name: str, sites: Sequence[SiteRecord]) -> bool:
    return any(not isinstance(site.federated_score(f"dice.{name}"), Missing) for site in sites)


def _number_or_none(value: Value) -> float | None:
    return None if isinstance(value, Missing) else value


def _course(values: Mapping[int, Value]) -> str:
    """Return a series in words: its first and last round."""
    numbers = sorted(values)
    if not numbers:
        return "not scored"
    first, last = numbers[0], numbers[-1]
    if first == last:
        return f"{words(values[first], 3)} in round {first}"
    return f"{words(values[first], 3)} in round {first}, {words(values[last], 3)} in round {last}"
