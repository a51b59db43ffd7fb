"""The sites that take part, the nodes that may not, and the sites that sit out some rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from semisam_core.plan_sections.aggregation import Exclusion
from server.admission import SPLIT_CHANGED, Admitted

SECOND = "a second site of this name"
ANOTHER_NAME = "its node takes part under another name"
RETRY_S = 30.0
LONGEST_RETRY_S = 600.0


@dataclass(frozen=True)
class Declined:
    """A node that asked to join and could not.

    Attributes:
        reason: why.
        site: the name it claims, or empty.
        retry_from_round: the round from which it is asked again if the reason is not transient.
        attempts: how often in a row it could not join for a transient reason; 0 if the reason is not transient.
        retry_at: when it is asked again if the reason is transient, on the server's clock.
    """

    reason: str
    site: str
    retry_from_round: int
    attempts: int = 0
    retry_at: float = 0.0

    @property
    def transient(self) -> bool:
        """Whether the reason may pass, so that the node is asked again soon."""
        return self.attempts > 0


@dataclass(frozen=True)
class Excluded:
    """A site that sits out some rounds because it failed too many in a row."""

    site: str
    reason: str
    failures: int
    until: int


class Roster:
    """Sites by name, and each site's node.

    Args:
        policy: after how many failures a site is excluded, and for how long.
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
        """Site -> node of all sites that have joined, sorted by name."""
        return {site: self._nodes[site] for site in sorted(self._nodes)}

    @property
    def declined(self) -> Mapping[int, Declined]:
        """Node -> why it could not join."""
        return self._declined

    def retrying(self, attempts: int | None = None) -> list[Declined]:
        """Return the nodes that could not join for a transient reason and are asked again soon.

        Args:
            attempts: leave out nodes that have been asked this often; None leaves out none.
        """
        transient = [each for each in self._declined.values() if each.transient]
        return [each for each in transient if attempts is None or each.attempts < attempts]

    def absent(self) -> list[str]:
        """Return the names of sites that once joined and are not connected."""
        return sorted(self._known - set(self._nodes))

    def knows(self, site: str) -> bool:
        """Return whether a site of this name has ever joined."""
        return site in self._known

    def remember(self, sites: Collection[str]) -> None:
        """Add the names of sites that joined before the server was restarted."""
        self._known.update(sites)

    def declared(self, site: str) -> Admitted | None:
        """Return the reply with which a site last joined."""
        return self._declared.get(site)

    def join(self, answer: Admitted, node: int, connected: Collection[int]) -> str | None:
        """Add a site, or move it to a new node if its old one is gone; return why it may not join, or None.

        A node never changes its name: otherwise one site could vote several times in a round.
        """
        site = answer.site
        if self._names.get(node, site) != site:
            return ANOTHER_NAME
        holder = self._nodes.get(site)
        if holder is not None and holder != node and holder in connected:
            return SECOND
        before = self._declared.get(site)
        if before is not None and before.split != answer.split:
            return SPLIT_CHANGED
        self._nodes[site], self._names[node], self._declared[site] = node, site, answer
        self._known.add(site)
        self._declined.pop(node, None)
        return None

    def decline(self, node: int, site: str, reason: str, number: int, transient_at: float | None = None) -> bool:
        """Note that a node could not join; return whether this, or its reason, is new.

        Args:
            node: the node.
            site: the name it claims.
            reason: why it could not join.
            number: the current round.
            transient_at: the server's clock if the reason may pass: the node is then asked again after `RETRY_S`,
                twice as long after each further failure, `LONGEST_RETRY_S` at most. None if it will not pass.
        """
        before = self._declined.get(node)
        attempts, retry_at = 0, 0.0
        if transient_at is not None:
            attempts = 1 + (before.attempts if before is not None else 0)
            retry_at = transient_at + min(RETRY_S * 2.0 ** (attempts - 1), LONGEST_RETRY_S)
        self._declined[node] = Declined(reason, site, number + self._policy.rounds + 1, attempts, retry_at)
        return before is None or before.reason != reason

    def forget_decline(self, node: int) -> None:
        """Let a node that has been restarted be asked again at once."""
        self._declined.pop(node, None)

    def leave(self, site: str) -> bool:
        """Remove a site that is gone; return whether it was present."""
        return self._nodes.pop(site, None) is not None

    def remove_disconnected(self, connected: Collection[int]) -> list[str]:
        """Drop all nodes that are not connected; return the names of the sites among them."""
        lost = [site for site, node in self.joined.items() if node not in connected]
        for site in lost:
            del self._nodes[site]
        self._declined = {node: why for node, why in self._declined.items() if node in connected}
        return lost

    def newcomers(self, connected: Sequence[int], number: int, now: float) -> list[int]:
        """Return the connected nodes to ask to join, in this round and at this time of the server's clock."""
        present = set(self._nodes.values())
        return [node for node in connected if node not in present and self._may_ask(node, number, now)]

    def _may_ask(self, node: int, number: int, now: float) -> bool:
        declined = self._declined.get(node)
        if declined is None:
            return True
        if declined.reason == SECOND:
            return declined.site not in self._nodes
        if declined.transient:
            return now >= declined.retry_at
        return number >= declined.retry_from_round

    def participants(self, number: int, needed: int) -> dict[str, int]:
        """Return site -> node of all sites to ask in a round.

        Excluded sites are included if there would otherwise be fewer than `needed`.
        """
        included = {site: node for site, node in self.joined.items() if not self.excluded(site, number)}
        return included if len(included) >= needed else dict(self.joined)

    def excluded(self, site: str, number: int) -> bool:
        """Return whether a site sits out this round."""
        return number <= self._until.get(site, 0)

    def close_round(self, number: int, contributed: Collection[str], failed: Mapping[str, str]) -> list[Excluded]:
        """Count failures in a row; return the sites that are excluded from now on.

        A site that fails again in its first round after an exclusion is excluded again at once.

        Args:
            number: the round that has ended.
            contributed: sites whose update was admitted.
            failed: site -> why it did not contribute although it was asked.
        """
        for site in contributed:
            self._failures.pop(site, None)
        found = []
        for site in sorted(failed):
            self._failures[site] = self._failures.get(site, 0) + 1
            if self._failures[site] >= self._policy.after_failures:
                self._until[site] = number + self._policy.rounds
                found.append(Excluded(site, failed[site], self._failures[site], self._until[site]))
        return found

    def replay(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Restore the failure counts from the records of rounds that ended before the server was restarted."""
        for line in rounds:
            self.close_round(int(line["round"]), list(line["weights"]), dict(line.get("failed", {})))
