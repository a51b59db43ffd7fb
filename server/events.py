"""A run's events in words, for people who follow it or read its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from semisam_core.small_numbers import bucket_words
from server.metrics_log import bucketed, gradient_shares

# What went wrong, and what was done about it.
FAULTS = frozenset(
    {
        "refused",
        "silent",
        "late",
        "left",
        "rejoined",
        "excluded",
        "waiting",
        "set-aside",
        "resumed",
        "sum-given-up",
        "not-logged",
    }
)


def count_words(count: float, in_bucket: bool) -> str:
    """Return a count for people: `7`, or `5-9` of one in a bucket."""
    return bucket_words(int(count)) if in_bucket else f"{count:.0f}"


class Narrator:
    """Puts the events of a run into words, one after another. A site's joining says whether its counts are buckets.

    Args:
        known: earlier lines of the metrics, which need not be said.
    """

    def __init__(self, known: Iterable[Mapping[str, Any]] = ()) -> None:
        self._coarse = {line["site"] for line in known if bucketed(line)}

    def describe(self, event: Mapping[str, Any]) -> str | None:
        """Return the next event in words, or None for one that people need not see."""
        if bucketed(event):
            self._coarse.add(event["site"])
        return describe(event, event.get("site") in self._coarse)


def describe(event: Mapping[str, Any], in_buckets: bool = False) -> str | None:
    """Return an event in words, or None for one that people need not see.

    Args:
        event: a line of the metrics.
        in_buckets: whether the site's counts are the lowest of a bucket.
    """
    kind = event.get("event")

    def count(name: str) -> str:
        return count_words(event.get(name, 0), in_buckets)

    if kind == "aggregated":
        left = event["rounds"] - event["round"]
        return (
            f"round {event['round']}/{event['rounds']} aggregated after {event['seconds']:.0f} s; "
            f"{left} left, about {left * event['seconds'] / 60:.1f} min"
        )
    if kind in ("joined", "rejoined"):
        return (
            f"{event['site']} {kind}: {count('labeled')} labeled, {count('unlabeled')} unlabeled, "
            f"{count('validation')} validation, {count('quarantined')} quarantined"
        )
    if kind == "trained":
        told = "accepted" in event  # a private round does not say
        pseudo_labels = f", pseudo-labels {count('accepted')} accepted, {count('gated')} gated" if told else ""
        return (
            f"round {event['round']}: {event['site']} trained {event['steps']:.0f} steps"
            f"{pseudo_labels}{_gradients(event, in_buckets)}{_epsilon(event)}"
        )
    if kind == "evaluated":
        scores = [f"{key[5:]} {value:.3f}" for key, value in event.items() if key.startswith("dice.")]
        withheld = "withheld" if in_buckets and event["validation"] else "not sent"
        return f"round {event['round']}: {event['site']} Dice {', '.join(scores) or withheld}"
    if kind == "refused":
        return f"round {event['round']}: {event['site']} is left out: {event['reason']}"
    if kind == "sum-given-up":
        return f"round {event['round']}: the secure sum was given up at attempt {event['attempt']}: {event['reason']}"
    if kind == "silent":
        return f"round {event['round']}: {', '.join(event['names'])} did not answer within {event['seconds']:g} s"
    return _fault(event)


def _epsilon(event: Mapping[str, Any]) -> str:
    """Return what a private round cost, if the site says so."""
    if "epsilon.round" not in event:
        return ""
    return (
        f"; privacy: epsilon {event['epsilon.round']:.2f}, in total {event['epsilon.total']:.2f} "
        f"at delta {event['epsilon.delta']:g}"
    )


def _gradients(event: Mapping[str, Any], in_buckets: bool) -> str:
    """Return each loss term's share of the gradients, so that a term that teaches nothing is seen at once."""
    shares = gradient_shares(event, in_buckets)
    return "; gradient " + ", ".join(f"{term} {share:.0%}" for term, share in shares.items()) if len(shares) > 1 else ""


def _fault(event: Mapping[str, Any]) -> str | None:
    """Return a sentence about a fault that the run handles, or None for other events."""
    kind, at = event.get("event"), f"round {event.get('round')}:"
    if kind == "late":
        return f"{at} the reply of {event['site']} came {event['seconds']:.0f} s late and is not used"
    if kind == "left":
        return f"{at} {event['site']} left: {event['reason']}"
    if kind == "waiting":
        return f"{at} too few sites; waiting up to {event['seconds']:g} s for {', '.join(event['sites']) or 'others'}"
    if kind == "excluded":
        return f"{at} {event['site']} is left out until round {event['until']}: {event['reason']}"
    if kind == "set-aside":
        return f"a checkpoint was set aside: {event['reason']}"
    if kind == "not-logged":
        return f"{event['logger']} could not be written, the run goes on: {event['reason']}"
    if kind == "resumed":
        return f"resumed from round {event['round']}"
    return None
