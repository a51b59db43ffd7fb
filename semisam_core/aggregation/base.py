"""The seam of aggregation: what a rule needs and tolerates, and how it combines updates."""

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
    """What the plan's `aggregation` section says to a rule."""

    @property
    def trim_share(self) -> float:
        """Share of values that a trimmed mean leaves out at each end."""

    @property
    def malicious_sites(self) -> int:
        """How many hostile sites Krum allows for."""


Votes = Callable[[Sequence[Update], Sequence[float], RuleSettings, int], list[float]]
Combine = Callable[[Sequence[Update], Sequence[float], RuleSettings], dict[str, Tensor]]


def _one_update(_: RuleSettings) -> int:
    return 1


def _tolerates_none(_: RuleSettings, sites: int) -> int:
    return 0


def keep_shares(
    updates: Sequence[Update], shares: Sequence[float], settings: RuleSettings, rejected: int
) -> list[float]:
    """Return the evidence weights as they are."""
    return list(shares)


def equal_votes(
    updates: Sequence[Update], shares: Sequence[float], settings: RuleSettings, rejected: int
) -> list[float]:
    """Return one vote for each update, whatever its evidence weight."""
    return [1 / len(shares)] * len(shares)


@dataclass(frozen=True)
class AggregationRule:
    """One rule by which updates become the new global specialist.

    Attributes:
        name: as plans call it.
        combine: (updates, votes, settings) -> the combined tensors. Every update has a vote above 0.
        votes: (updates, evidence weights, settings, number of rejected sites) -> what each update counts, summing to
            one. Every update has an evidence weight above 0.
        least_updates: settings -> the fewest updates for which the rule keeps its promise.
        tolerates: (settings, number of sites) -> how many hostile ones among them cannot steer the result.
    """

    name: str
    combine: Combine
    votes: Votes = keep_shares
    least_updates: Callable[[RuleSettings], int] = _one_update
    tolerates: Callable[[RuleSettings, int], int] = _tolerates_none
