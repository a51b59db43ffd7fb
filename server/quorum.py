"""How long the server waits for sites: to start, in each round, and when too few contribute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from flwr.app import MessageType

from semisam_core.errors import SemiSAMError
from semisam_core.plan import Plan
from server.admission import Admitted, Rejected
from server.arrays import Reader
from server.exchange import ATTEMPTS, Content, Exchange, Phase
from server.roster import RETRY_S, Declined

SHOWN_REASONS = 20


class TooFewSitesError(SemiSAMError):
    """Fewer sites than the plan's minimum, after all waiting."""


class Quorum:
    """Runs each phase of a study until enough sites have contributed or waiting has ended.

    Args:
        plan: the study plan.
        exchange: sends messages and handles replies.
        expected: how many sites are expected.
    """

    def __init__(self, plan: Plan, exchange: Exchange, expected: int) -> None:
        self._plan, self._exchange, self._expected = plan, exchange, expected
        self._roster, self._mailbox, self._clock = exchange.roster, exchange.mailbox, exchange.clock
        self._waits, self._folder = plan.aggregation, exchange.folder

    def gather(self, number: int) -> None:
        """Let sites join until all expected ones have answered or the deadline has passed.

        Connecting and answering have `join_deadline_s` each. A site that cannot join for a reason that may pass is
        asked again until then; once the minimum is reached, `ATTEMPTS` times at most.

        Args:
            number: the last finished round.

        Raises:
            TooFewSitesError: fewer sites than the plan's minimum have joined.
        """
        self._exchange.round = number
        began = self._clock.now()
        connect_by = began + self._waits.join_deadline_s
        answer_by = connect_by + self._waits.join_deadline_s
        self._exchange.refresh(at_once=True)
        self._exchange.report()
        while True:
            now, joining = self._clock.now(), self._mailbox.awaited(MessageType.QUERY)
            if now >= answer_by or (not joining and (self._all_answered() or now >= connect_by)):
                break
            self._exchange.poll()
            self._exchange.note = self._joined_so_far()
            self._exchange.report()
        joined, connected, needed = len(self._roster.joined), len(self._exchange.connected), self._waits.minimum_sites
        if joined >= needed:
            return
        if connected < needed:
            raise TooFewSitesError(
                f"{connected} of {self._expected} sites connected within {self._waits.join_deadline_s:g} s; "
                f"the plan needs {needed}."
            )
        raise TooFewSitesError(
            f"{joined} sites joined, the plan needs {needed}. {self._refusals(self._exchange.round)}"
        )

    def _all_answered(self) -> bool:
        enough = len(self._roster.joined) >= self._waits.minimum_sites
        retrying = self._roster.retrying(ATTEMPTS if enough else None)
        return len(self._roster.joined) + len(self._roster.declined) - len(retrying) >= self._expected

    def _joined_so_far(self) -> str:
        text = f"{len(self._roster.joined)} of {self._expected} sites have joined."
        if retrying := self._roster.retrying():
            text += f" Asking again: {'; '.join(map(_why, retrying[:SHOWN_REASONS]))}."
        return text

    def train(
        self,
        number: int,
        content: Content,
        accept: Callable[[Admitted], None],
        review: Callable[[], Sequence[Rejected]],
        read: Reader | None,
    ) -> Phase:
        """Let all sites of a round train; wait for more sites if too few contribute.

        Args:
            number: the round.
            content: makes the messages.
            accept: receives each admitted reply.
            review: called when all sites have replied; drops the updates that do not fit the others and returns them.
            read: reads the updates; None if they are summed securely afterwards.

        Raises:
            TooFewSitesError: fewer sites than the plan's minimum contributed, after all waiting.
        """
        phase = self._exchange.begin(MessageType.TRAIN, number, content, accept, read)
        self._send(phase, self._roster.participants(number, self._waits.minimum_sites))
        give_up: float | None = None
        while True:
            if not self._mailbox.awaited(phase.kind, number):
                for answer in review():
                    self._exchange.reject(phase, answer)
                if self._enough(phase):
                    break
                if self._recall(phase):
                    continue
                if give_up is None:
                    give_up = self._clock.now() + self._waits.wait_for_quorum_s
                    phase.joinable_until = give_up
                    self._report_missing(phase)
                if self._clock.now() >= give_up or not self._more_may_come(phase):
                    self._exchange.end()
                    raise TooFewSitesError(self._shortage(phase))
                self._retry(phase)
            self._exchange.poll()
        self._exchange.end()
        return phase

    def evaluate(self, number: int, content: Content, accept: Callable[[Admitted], None], final: bool) -> Phase:
        """Ask sites for their scores; excluded sites and those still training are asked only at the end."""
        phase = self._exchange.begin(MessageType.EVALUATE, number, content, accept, None)
        busy = set() if final else {sent.site for sent in self._mailbox.unanswered(MessageType.TRAIN)}
        present = self._roster.joined if final else self._roster.participants(number, self._waits.minimum_sites)
        self._send(phase, {site: node for site, node in present.items() if site not in busy})
        while self._mailbox.awaited(phase.kind, number):
            self._exchange.poll()
        self._exchange.end()
        return phase

    def _send(self, phase: Phase, asked: Mapping[str, int]) -> None:
        self._folder.record("asked", kind=phase.kind, round=phase.round, sites=len(asked), names=list(asked))
        for site, node in asked.items():
            self._exchange.send(phase, site, node)
        self._exchange.report()

    def _enough(self, phase: Phase) -> bool:
        """Return whether a round counts.

        A hostile site must not stop a robust rule by sending nonsense: rejected replies count towards the minimum, up
        to the number of hostile sites that the rule tolerates.
        """
        tolerated_sites = min(len(phase.rejected), self._waits.tolerated_sites)
        return bool(phase.done) and len(phase.done) + tolerated_sites >= self._waits.minimum_sites

    def _more_may_come(self, phase: Phase) -> bool:
        """Return whether waiting may bring more sites: some are absent, or failed for a reason that may pass."""
        final = len(self._roster.declined) - len(self._roster.retrying())
        missing = self._expected - len(self._roster.joined) - final
        again = [site for site in phase.retryable if phase.attempts.get(site, 0) < ATTEMPTS]
        return bool(missing > 0 or again or self._roster.absent() or self._mailbox.awaited(MessageType.QUERY))

    def _recall(self, phase: Phase) -> bool:
        """Ask excluded sites after all, since too few others contributed; return whether there are any."""
        spared = {site: node for site, node in self._roster.joined.items() if site not in phase.attempts}
        for site, node in spared.items():
            self._exchange.send(phase, site, node)
        return bool(spared)

    def _retry(self, phase: Phase) -> None:
        now = self._clock.now()
        if now < phase.retried + RETRY_S:
            return
        phase.retried = now
        joined = self._roster.joined
        for site in sorted(phase.retryable):
            if site in joined:
                self._exchange.send(phase, site, joined[site])

    def _report_missing(self, phase: Phase) -> None:
        seconds = self._waits.wait_for_quorum_s
        missing = sorted(set(self._roster.absent()) | set(phase.failed))
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        phase.reason = (
            f"Round {phase.round}: {len(phase.done)} sites contributed, the plan needs {self._waits.minimum_sites}. "
            f"Waiting until {until:%Y-%m-%d %H:%M:%S} UTC for {', '.join(missing) or 'more sites'}."
        )
        self._folder.record("waiting", round=phase.round, sites=missing, seconds=seconds)
        self._exchange.report()

    def _shortage(self, phase: Phase) -> str:
        absent = [f"{site}: not connected" for site in self._roster.absent() if site not in phase.failed]
        reasons = [f"{site}: {reason}" for site, reason in sorted(phase.failed.items())] + absent
        why = "; ".join(reasons[:SHOWN_REASONS]) or self._refusals(phase.round)
        if not phase.done:
            return f"Round {phase.round}: no site contributed. {why}"
        needed = self._waits.minimum_sites
        return f"Round {phase.round}: {len(phase.done)} sites contributed, the plan needs {needed}. {why}"

    def _refusals(self, number: int) -> str:
        lines = [f"{r['site']}: {r['reason']}" for r in self._folder.records("refused") if r["round"] == number]
        return "; ".join(lines[-SHOWN_REASONS:]) if lines else "No site gave a reason."


def _why(declined: Declined) -> str:
    return f"{declined.site} ({declined.reason})"
