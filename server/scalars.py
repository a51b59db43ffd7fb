"""A run's scalars by round, for TensorBoard and MLflow, from the lines of its metrics and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from semisam_core.codecs import leaving_bytes
from semisam_core.plan import Plan
from server.metrics_log import bucketed, counted, gradient_shares, mean_over_classes

SCORES = ("dice", "hd95_mm")
# Their names in a line of the metrics, and what they are called here, before `/<site>`.
_COUNTS = {"accepted": "pseudo-labels.accepted", "gated": "pseudo-labels.refused"}
_AS_SENT = frozenset({"confidence", "steps", "seconds", "epsilon", "loss"})

Scalars = dict[str, float]


@dataclass(frozen=True)
class RoundScalars:
    """What is known of a round at one moment: after its updates were combined, or after it was scored.

    Attributes:
        round: the round.
        time: when, in seconds since 1970.
        values: name -> value.
    """

    round: int
    time: float
    values: Mapping[str, float]


@dataclass
class ScalarReader:
    """Turns lines of the metrics into scalars, one line at a time.

    Names are `<quantity>/<site>`, `mean/<score>` over the sites that sent one, and `total/<quantity>` over all sites. A
    number that a site withholds has no scalar. Counts of a site that sends buckets are the lowest of their bucket.

    Attributes:
        plan: the study plan.
    """

    plan: Plan
    _coarse: set[str] = field(default_factory=set)
    _trained: dict[tuple[int, str], Mapping[str, Any]] = field(default_factory=dict)
    _evaluated: dict[tuple[int, str], Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._update_bytes = leaving_bytes(self.plan)

    def read(self, line: Mapping[str, Any]) -> RoundScalars | None:
        """Take in a line; return scalars if it completes a step of a round: all sites' updates, or all scores."""
        event = line.get("event")
        if event in ("joined", "rejoined"):
            (self._coarse.add if bucketed(line) else self._coarse.discard)(str(line["site"]))
        elif event == "trained":
            self._trained[int(line["round"]), str(line["site"])] = line
        elif event == "evaluated":
            self._evaluated[int(line["round"]), str(line["site"])] = line
        elif event == "aggregated":
            return self._of_round(line, self._aggregated(line, _taken(self._trained, int(line["round"]))))
        elif event == "scored":
            return self._of_round(line, self._scored(_taken(self._evaluated, int(line["round"]))))
        return None

    @staticmethod
    def _of_round(line: Mapping[str, Any], values: Scalars) -> RoundScalars:
        return RoundScalars(int(line["round"]), float(line["time"]), values)

    def _aggregated(self, line: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]]) -> Scalars:
        values = {"total/sites": float(len(sites)), "total/bytes": float(self._update_bytes * len(sites))}
        values["total/seconds"] = float(line["seconds"])
        for site, trained in sites.items():
            values[f"bytes/{site}"] = float(self._update_bytes)
            values |= {f"{name}/{site}": value for name, value in _numbers(trained).items()}
            shares = gradient_shares(trained, site in self._coarse)
            values |= {f"gradient-share.{term}/{site}": share for term, share in shares.items()}
            if (weight := line["weights"].get(site)) is not None:  # in a secure sum only the site knows it
                values[f"weight/{site}"] = float(weight)
        return values

    def _scored(self, sites: Mapping[str, Mapping[str, Any]]) -> Scalars:
        values: Scalars = {}
        for score in SCORES:
            means = {site: mean_over_classes(line, score) for site, line in sites.items()}
            known = {site: mean for site, mean in means.items() if mean is not None}
            values |= {f"{score}/{site}": mean for site, mean in known.items()}
            if known:
                values[f"mean/{score}"] = sum(known.values()) / len(known)
            for name in self.plan.class_names if len(self.plan.class_names) > 1 else ():
                key = f"{score}.{name}"
                values |= {f"{key}/{site}": float(line[key]) for site, line in sites.items() if key in line}
        return values


def history(plan: Plan, lines: Iterable[Mapping[str, Any]]) -> list[RoundScalars]:
    """Return all scalars of a run, each once: of what a resumed run has repeated, the last.

    Args:
        plan: the study plan.
        lines: all lines of the metrics, in the order in which they were written.
    """
    reader, found = ScalarReader(plan), dict[tuple[int, str], RoundScalars]()
    for line in counted(lines):
        if (step := reader.read(line)) is not None:
            found[step.round, line["event"]] = step
    return list(found.values())


def _numbers(trained: Mapping[str, Any]) -> Scalars:
    """Return what a site sent with its update, by the names used here."""
    values = {}
    for key, value in trained.items():
        kind, _, rest = key.partition(".")
        if kind in _COUNTS:
            values[f"{_COUNTS[kind]}.{rest}" if rest else _COUNTS[kind]] = float(value)
        elif kind in _AS_SENT:
            values[key] = float(value)
    return values


def _taken(lines: dict[tuple[int, str], Mapping[str, Any]], number: int) -> dict[str, Mapping[str, Any]]:
    """Take the lines of a round out and return them by site."""
    return {site: lines.pop((of, site)) for of, site in sorted(lines) if of == number}
