"""What is compared: arms, baseline, seeds, label counts. Apart from the plan, whose hash must not depend on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from experiments.comparison.arms import arm_of, default_arm_names
from semisam_core.configuration import StrictModel, parse
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan

ALL = "all"
SETTING = re.compile(r"^(all|[0-9]+(,[0-9]+)*)$")


class Definition(StrictModel):
    """One comparison.

    Attributes:
        arms: `<alone|federated|pooled>-<supervised|regularizer|semisam>`.
        baseline: the arm that the others are compared with.
        seeds: each arm is run once with each seed.
        labeled: label counts: `all` uses each site's whole list of labeled cases, a number the first of the list, and
            several numbers (1,1,0) one count per site in name order.
        oracles: whether generalists are also scored with true prompts.
    """

    arms: tuple[str, ...] = Field(min_length=1)
    baseline: str
    seeds: tuple[int, ...] = Field(min_length=1)
    labeled: tuple[str, ...] = Field(default=(ALL,), min_length=1)
    oracles: bool = True

    @field_validator("labeled", mode="before")
    @classmethod
    def _numbers_are_settings(cls, value: Any) -> Any:
        """Accept 4 as well as "4"."""
        if not isinstance(value, list | tuple):
            return value
        return tuple(str(each) if type(each) is int else each for each in value)

    @field_validator("labeled")
    @classmethod
    def _settings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not SETTING.fullmatch(each):
                raise ValueError(f"{each!r} is not a label count; accepted: all, a number, or one per site as in 1,1,0")
        return _distinct(value)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 <= each < 2**31 for each in value):
            raise ValueError("seeds are between 0 and 2147483647")
        return _distinct(value)

    @field_validator("arms")
    @classmethod
    def _arms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value)


def define(content: Mapping[str, Any], plan: Plan, origin: str) -> Definition:
    """Validate a definition; keys that `content` omits get defaults from the plan.

    By default the arms are all that the plan allows except those that leave out a source of evidence, the only seed is
    the plan's, and the baseline is `federated-supervised` if that is an arm, else the first arm.

    Raises:
        ConfigError: key, value and what is accepted.
    """
    filled = dict(content)
    filled.setdefault("arms", list(default_arm_names(plan)))
    filled.setdefault("seeds", [plan.seed])
    arms = filled["arms"]
    if "baseline" not in filled and isinstance(arms, list | tuple) and arms:
        filled["baseline"] = "federated-supervised" if "federated-supervised" in arms else arms[0]
    definition = parse(Definition, filled, origin)
    for name in definition.arms:
        arm_of(name, plan)
    if definition.baseline not in definition.arms:
        raise ConfigError(
            f"{origin}: baseline = {definition.baseline!r}: not one of the arms {', '.join(definition.arms)}."
        )
    return definition


def label_counts(setting: str, listed: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return how many labeled cases each site uses under a label count.

    Args:
        setting: `all`, a number, or one number per site in name order.
        listed: site -> its labeled cases.

    Raises:
        ConfigError: the count is for another number of sites, or a site has too few labeled cases.
    """
    sites = sorted(listed)
    if setting == ALL:
        return {site: len(listed[site]) for site in sites}
    numbers = [int(part) for part in setting.split(",")]
    if len(numbers) not in (1, len(sites)):
        raise ConfigError(f"labeled: {setting}: expected one number, or {len(sites)}: one each for {', '.join(sites)}.")
    counts = dict(zip(sites, numbers * len(sites) if len(numbers) == 1 else numbers, strict=True))
    for site, count in counts.items():
        if count > len(listed[site]):
            raise ConfigError(
                f"labeled: {setting}: {site} lists only {len(listed[site])} labeled cases; give one number per site: "
                f"{', '.join(sites)}."
            )
    return counts


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) < len(value):
        raise ValueError("name each only once")
    return value
