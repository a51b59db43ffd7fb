"""Which lines of a run's metrics count: a killed server may have written some of them twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RESUMED = "resumed"
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
