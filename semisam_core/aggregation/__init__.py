"""Rules of aggregation by name. A new one is a module with a `RULE` and a line in `RULES`."""

from __future__ import annotations

from semisam_core.aggregation import krum, median, multi_krum, trimmed_mean, weighted_mean
from semisam_core.aggregation.base import AggregationRule, RuleSettings, Update
from semisam_core.registry import add_entry

__all__ = ["RULES", "AggregationRule", "RuleSettings", "Update", "aggregation_rule", "register_rule"]

RULES: dict[str, AggregationRule] = {
    rule.name: rule
    for rule in (
        weighted_mean.RULE,
        median.RULE,
        trimmed_mean.RULE,
        krum.RULE,
        multi_krum.RULE,
    )
}


def register_rule(rule: AggregationRule) -> None:
    """Add a rule to the registry of this process.

    Raises:
        ValueError: another rule has the name.
    """
    add_entry(RULES, "rule", rule.name, rule)


def aggregation_rule(name: str) -> AggregationRule:
    """Return the rule of this name.

    Raises:
        ValueError: there is none; the message lists the accepted names.
    """
    if name not in RULES:
        raise ValueError(f"there is no aggregation rule {name!r}; accepted: {', '.join(RULES)}")
    return RULES[name]
