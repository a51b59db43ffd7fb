"""How long sites are waited for: at the start, in a round, and when there are too few."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from flwr.app import MessageType

from semisam_core.contract import TensorSpec
from semisam_core.errors import SemiSAMError
from semisam_core.plan import Plan
from server.admission import Admitted, Rejected
from server.exchange import ATTEMPTS, RETRY_S, Content, Phase, Reception

SHOWN_REASONS = 20


class TooFewSitesError(SemiSAMError):
    """The plan's minimum of sites was not reached, though it was waited for."""


class Attendance:
    """Runs the phases of a study to their end.

    Args:
        plan: the study plan.
        reception: asks and hears.
        expected: how many sites the study was announced to.
    """

    def __init__(self, plan: Plan, reception: Reception, expected: int) -> None:
        self._plan, self._reception, self._expected = plan, reception, expected
        self._roster, self._post, self._clock = reception.roster, reception.post, reception.clock
        self._waits, self._folder = plan.aggregation, reception.folder

    def gather(self, number: int) -> None:
        """Let sites join until all that are expected have answered, or the deadline ends.

        Connecting and answering each have `join_deadline_s`.

        Args:
            number: the last round that is done.

        Raises:
            TooFewSitesError: fewer than the plan's minimum have joined.
        """
        self._reception.round = number
        began = self._clock.now()
        connect_by = began + self._waits.join_deadline_s
        answer_by = connect_by + self._waits.join_deadline_s
        self._reception.look(at_once=True)
        self._reception.tell()
        while True:
            now, joining = self._clock.now(), self._post.under_way(MessageType.QUERY)
            answered = len(self._roster.joined) + len(self._roster.declined)
            if now >= answer_by or (not joining and (answered >= self._expected or now >= connect_by)):
                break
            self._reception.turn()
            self._reception.note = f"{len(self._roster.joined)} of {self._expected} sites have joined."
            self._reception.tell()
        joined, connected, needed = len(self._roster.joined), len(self._reception.connected), self._waits.minimum_sites
        if joined >= needed:
            return
        if connected < needed:
            raise TooFewSitesError(
                f"{connected} of {self._expected} sites connected within {self._waits.join_deadline_s:g} s; "
                f"the plan needs {needed}."
            )
        raise TooFewSitesError(
            f"{joined} sites joined, the plan needs {needed}. {self._refusals(self._reception.round)}"
        )

    def train(
        self,
        number: int,
        content: Content,
        accept: Callable[[Admitted], None],
        review: Callable[[], Sequence[Rejected]],
        spec: Mapping[str, TensorSpec],
    ) -> Phase:
        """Ask every site that works in this round; wait for more where too few contribute.

        Args:
            number: the round.
            content: makes the messages.
            accept: takes each admitted answer.
            review: called when all have answered; drops answers that do not fit the others, and says which.
            spec: the agreed tensors.

        Raises:
            TooFewSitesError: fewer than the plan's minimum contributed, after all waiting.
        """
        phase = self._reception.begin(MessageType.TRAIN, number, content, accept, spec)
        asked = self._roster.working(number, self._waits.minimum_sites)
        self._folder.record("asked", kind=phase.kind, round=number, sites=len(asked), names=list(asked))
        for site, node in asked.items():
            self._reception.ask(phase, site, node)
        self._reception.tell()
        give_up: float | None = None
        while True:
            if not self._post.under_way(phase.kind, number):
                for answer in review():
                    self._reception.reject(phase, answer)
                if self._enough(phase):
                    break
                if self._recall(phase):
                    continue
                if give_up is None:
                    give_up = self._clock.now() + self._waits.wait_for_quorum_s
                    phase.joinable_until = give_up
                    self._say_what_is_missing(phase)
                if self._clock.now() >= give_up or not self._hope(phase):
                    self._reception.end()
                    raise TooFewSitesError(self._shortage(phase))
                self._ask_again(phase)
            self._reception.turn()
        self._reception.end()
        return phase

    def evaluate(self, number: int, content: Content, accept: Callable[[Admitted], None], final: bool) -> Phase:
        """Ask sites for their scores; one that is left out or still at its training is asked at the end only."""
        phase = self._reception.begin(MessageType.EVALUATE, number, content, accept, None)
        busy = set() if final else {question.site for question in self._post.asked(MessageType.TRAIN)}
        there = self._roster.joined if final else self._roster.working(number, self._waits.minimum_sites)
        asked = {site: node for site, node in there.items() if site not in busy}
        self._folder.record("asked", kind=phase.kind, round=number, sites=len(asked), names=list(asked))
        for site, node in asked.items():
            self._reception.ask(phase, site, node)
        self._reception.tell()
        while self._post.under_way(phase.kind, number):
            self._reception.turn()
        self._reception.end()
        return phase

    def _enough(self, phase: Phase) -> bool:
        """Return whether a round counts.

        A rule that bears hostile sites must not be stopped by one that sends nonsense: there, rejected answers count
        towards the minimum, as many as the rule bears.
        """
        tolerated_sites = min(len(phase.rejected), self._waits.tolerated_sites)
        return bool(phase.done) and len(phase.done) + tolerated_sites >= self._waits.minimum_sites

    def _hope(self, phase: Phase) -> bool:
        """Return whether waiting may bring more sites: some are absent, or failed by what may pass."""
        missing = self._expected - len(self._roster.joined) - len(self._roster.declined)
        again = [site for site in phase.may_pass if phase.attempts.get(site, 0) < ATTEMPTS]
        return bool(missing > 0 or again or self._roster.absent() or self._post.under_way(MessageType.QUERY))

    def _recall(self, phase: Phase) -> bool:
        """Ask sites that were left out for their failures, since too few others contribute; return whether any."""
        spared = {site: node for site, node in self._roster.joined.items() if site not in phase.attempts}
        for site, node in spared.items():
            self._reception.ask(phase, site, node)
        return bool(spared)

    def _ask_again(self, phase: Phase) -> None:
        now = self._clock.now()
        if now < phase.retried + RETRY_S:
            return
        phase.retried = now
        joined = self._roster.joined
        for site in sorted(phase.may_pass):
            if site in joined:
                self._reception.ask(phase, site, joined[site])

    def _say_what_is_missing(self, phase: Phase) -> None:
        seconds = self._waits.wait_for_quorum_s
        missing = sorted(set(self._roster.absent()) | set(phase.failed))
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        phase.reason = (
            f"Round {phase.round}: {len(phase.done)} sites contributed, the plan needs {self._waits.minimum_sites}. "
            f"Waiting until {until:%Y-%m-%d %H:%M:%S} UTC for {', '.join(missing) or 'further sites'}."
        )
        self._folder.record("waiting", round=phase.round, sites=missing, seconds=seconds)
        self._reception.tell()

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
        return "; ".join(lines[-SHOWN_REASONS:]) if lines else "No site said why."
