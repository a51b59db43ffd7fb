"""Who takes part: sites that have joined, nodes that may not, and sites that are left out for a while."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semisam_core.plan_sections.aggregation import Exclusion
from server.admission import Admitted

SECOND = "a second site of this name"
ANOTHER_NAME = "its node takes part under another name"


@dataclass(frozen=True)
class Declined:
    """A node that may not take part.

    Attributes:
        reason: why.
        site: the name that it claims, or empty.
        ask_again: the round from which it is asked again; at once where the site that bears its name has gone.
    """

    reason: str
    site: str
    ask_again: int


@dataclass(frozen=True)
class LeftOut:
    """A site that is not asked for some rounds, since it failed too often in a row."""

    site: str
    reason: str
    failures: int
    until: int


class Roster:
    """Sites by name, and the node that each is at.

    Args:
        policy: after how many failures a site is left out, and for how long.
    """

    def __init__(self, policy: Exclusion) -> None:
        self._policy = policy
        self._nodes: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._declared: dict[str, Admitted] = {}
        self._known: set[str] = set()
        self._declined: dict[int, Declined] = {}
        self._failures: dict[str, int] = {}
        self._until: dict[str, int] = {}

    @property
    def joined(self) -> Mapping[str, int]:
        """Site -> node of all that have joined, in the order of names."""
        return {site: self._nodes[site] for site in sorted(self._nodes)}

    @property
    def declined(self) -> Mapping[int, Declined]:
        """Node -> why it may not take part."""
        return self._declined

    def absent(self) -> list[str]:
        """Return the names of sites that took part once and are not there."""
        return sorted(self._known - set(self._nodes))

    def knows(self, site: str) -> bool:
        """Return whether a site of this name has ever joined."""
        return site in self._known

    def remember(self, sites: Collection[str]) -> None:
        """Take in the names of sites that had joined before the server was started again."""
        self._known.update(sites)

    def declared(self, site: str) -> Admitted | None:
        """Return what a site said of itself when it last joined."""
        return self._declared.get(site)

    def join(self, answer: Admitted, node: int, connected: Collection[int]) -> str | None:
        """Take a site in, at a new node where its old one is gone; return why not, or None.

        A node has one name for good: with several, one site would have several votes in a round.
        """
        site = answer.site
        if self._names.get(node, site) != site:
            return ANOTHER_NAME
        holder = self._nodes.get(site)
        if holder is not None and holder != node and holder in connected:
            return SECOND
        self._nodes[site], self._names[node], self._declared[site] = node, site, answer
        self._known.add(site)
        self._declined.pop(node, None)
        return None

    def decline(self, node: int, site: str, reason: str, number: int) -> bool:
        """Note that a node may not take part; return whether that, or the reason, is new."""
        before = self._declined.get(node)
        self._declined[node] = Declined(reason, site, number + self._policy.rounds + 1)
        return before is None or before.reason != reason

    def leave(self, site: str) -> bool:
        """Note that a site is gone; return whether it was there."""
        return self._nodes.pop(site, None) is not None

    def gone(self, connected: Collection[int]) -> list[str]:
        """Drop all whose node is not connected; return the names of sites among them."""
        lost = [site for site, node in self.joined.items() if node not in connected]
        for site in lost:
            del self._nodes[site]
        self._declined = {node: why for node, why in self._declined.items() if node in connected}
        return lost

    def newcomers(self, connected: Sequence[int], number: int) -> list[int]:
        """Return the connected nodes that should be asked to join."""
        there = set(self._nodes.values())
        return [node for node in connected if node not in there and self._may_ask(node, number)]

    def _may_ask(self, node: int, number: int) -> bool:
        declined = self._declined.get(node)
        if declined is None:
            return True
        if declined.reason == SECOND:
            return declined.site not in self._nodes
        return number >= declined.ask_again

    def working(self, number: int, needed: int) -> dict[str, int]:
        """Return site -> node of all that are asked in a round.

        Sites that are left out are asked all the same where there would otherwise be fewer than `needed`.
        """
        working = {site: node for site, node in self.joined.items() if not self.left_out(site, number)}
        return working if len(working) >= needed else dict(self.joined)

    def left_out(self, site: str, number: int) -> bool:
        """Return whether a site is not to be asked in this round."""
        return number <= self._until.get(site, 0)

    def close_round(self, number: int, contributed: Collection[str], failed: Mapping[str, str]) -> list[LeftOut]:
        """Count failures in a row; return the sites that are left out from now on.

        A site that has been asked again and fails once more is left out again at once.

        Args:
            number: the round that has ended.
            contributed: sites whose update was admitted.
            failed: site -> why it did not contribute, though it was asked.
        """
        for site in contributed:
            self._failures.pop(site, None)
        found = []
        for site in sorted(failed):
            self._failures[site] = self._failures.get(site, 0) + 1
            if self._failures[site] >= self._policy.after_failures:
                self._until[site] = number + self._policy.rounds
                found.append(LeftOut(site, failed[site], self._failures[site], self._until[site]))
        return found

    def replay(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Count failures of the rounds that were done before the server was started again, from their records."""
        for line in rounds:
            self.close_round(int(line["round"]), list(line["weights"]), dict(line.get("failed", {})))
