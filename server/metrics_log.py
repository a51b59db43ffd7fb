"""What counts among the lines of a run's metrics, of which a killed server may have written some twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RESUMED = "resumed"
AT_THE_END = ("selected",)


def counted(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of rounds that were not cut.

    A server that goes on from round r does all later rounds again: what was written of them before does not count, nor
    what was written at the run's end. Of two scores of one site in one round the later one counts; readers that index
    lines by round and site get it by themselves.

    Args:
        lines: in the order in which they were written.
    """
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line.get("event") == RESUMED:
            kept = [each for each in kept if each.get("round", 0) <= line["round"] and each["event"] not in AT_THE_END]
        kept.append(dict(line))
    return kept
