"""The interface of an aggregation rule: what it needs and tolerates, and how it combines updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Update(Protocol):
    """One site's admitted update of one round, read tensor by tensor."""

    @property
    def site(self) -> str:
        """The site's name."""
        ...

    @property
    def scalars(self) -> Mapping[str, float]:
        """The agreed scalars."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the specialist's tensors, the same at every site."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


class RuleSettings(Protocol):
    """The settings that a rule reads from the plan's `aggregation` section."""

    @property
    def trim_share(self) -> float:
        """Share of the values that a trimmed mean drops at each end."""

    @property
    def malicious_sites(self) -> int:
        """How many hostile sites Krum assumes."""


Votes = Callable[[Sequence[Update], Sequence[float], RuleSettings, int], list[float]]
Combine = Callable[[Sequence[Update], Sequence[float], RuleSettings], dict[str, Tensor]]


def _one_update(_: RuleSettings) -> int:
    return 1


def _tolerates_none(_: RuleSettings, sites: int) -> int:
    return 0


def keep_shares(
    updates: Sequence[Update], shares: Sequence[float], settings: RuleSettings, rejected: int
) -> list[float]:
    """Return the evidence weights unchanged."""
    return list(shares)


def equal_votes(
    updates: Sequence[Update], shares: Sequence[float], settings: RuleSettings, rejected: int
) -> list[float]:
    """Return the same vote for each update, whatever its evidence weight."""
    return [1 / len(shares)] * len(shares)


@dataclass(frozen=True)
class AggregationRule:
    """One rule by which updates become the new global specialist.

    Attributes:
        name: its name in plans.
        combine: (updates, votes, settings) -> the combined tensors. Every vote is above 0.
        votes: (updates, evidence weights, settings, number of rejected sites) -> each update's vote, summing to one.
            Every evidence weight is above 0.
        least_updates: settings -> the fewest updates with which the rule keeps its promise.
        tolerates: (settings, number of sites) -> how many hostile sites among them cannot steer the result.
    """

    name: str
    combine: Combine
    votes: Votes = keep_shares
    least_updates: Callable[[RuleSettings], int] = _one_update
    tolerates: Callable[[RuleSettings, int], int] = _tolerates_none
