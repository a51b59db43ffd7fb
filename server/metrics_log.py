"""Which lines of a run's metrics count: a killed server may have written some of them twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from semisam_core.contract import BUCKETED_COUNTS, COUNTS_WORD

RESUMED = "resumed"
TERMS = ("supervised", "consistency", "generalist")  # of the loss
AT_THE_END = ("selected",)


def counted(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines that count.

    A server that resumes after round r repeats all later rounds: their earlier lines do not count, nor do lines from
    the run's end. If a site has two scores in a round, the later one counts; readers that index lines by round and site
    need not care.

    Args:
        lines: all lines, in the order in which they were written.
    """
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == RESUMED:
            kept = [each for each in kept if each.get("round", 0) <= line["round"] and each["event"] not in AT_THE_END]
        kept.append(dict(line))
    return kept


def gradients(trained: Mapping[str, Any], coarse: bool) -> dict[str, float] | None:
    """Return the norm of each loss term's gradient in a site's round; None if one that it has was withheld.

    Args:
        trained: the site's line of the round.
        coarse: whether the site sends buckets and rounded numbers, and withholds what is about few patients.
    """
    norms = {key.partition(".")[2]: float(norm) for key, norm in trained.items() if key.startswith("gradient.")}
    if norms and trained.get("labeled", 0) > 0 and "supervised" not in norms:
        return None
    if norms and coarse and trained.get("accepted", 0) > 0 and "generalist" not in norms:
        return None
    return norms


def gradient_shares(trained: Mapping[str, Any], coarse: bool) -> dict[str, float]:
    """Return each loss term's share of the gradients; empty where it is not known: without all terms it would be false.

    Args:
        trained: the site's line of the round.
        coarse: as in `gradients`.
    """
    norms = gradients(trained, coarse) or {}
    total = sum(norms.values())
    return {term: norm / total for term, norm in norms.items()} if total > 0 else {}


def mean_over_classes(scored: Mapping[str, Any], score: str) -> float | None:
    """Return the mean of a score over the classes for which a site sent it; None if it sent it for none.

    Args:
        scored: the site's line of scores.
        score: `dice`, `hd95_mm` and so on.
    """
    values = [float(value) for key, value in scored.items() if key.startswith(f"{score}.")]
    return sum(values) / len(values) if values else None


def bucketed(joined: Mapping[str, Any]) -> bool:
    """Return whether a site's counts are the lowest of a bucket, by the record of its joining."""
    return joined.get(COUNTS_WORD) == BUCKETED_COUNTS
