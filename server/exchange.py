"""The exchange of messages with sites: each has a deadline, and no site can hold up another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from semisam_core.contract import BUCKETED_COUNTS, COUNTS_WORD, SECURE_RECORD, RejectionRule, Stage
from semisam_core.plan import Plan
from server.admission import UNREACHABLE, Admitted, Failed, NotAdmitted, Rejected, admit
from server.arrays import Reader
from server.messages import Clock, Mailbox, SentMessage
from server.roster import Roster
from server.run_folder import RunFolder

POLL_S = 0.5
REFRESH_S = 2.0
ATTEMPTS = 3
MISNAMED = "its key was admitted under another name"
GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)

# Makes a message to a site, given the rule and the round of its last rejected reply, if there was one.
Content = Callable[[str, tuple[RejectionRule, int] | None], RecordDict]


@dataclass
class Phase:
    """What sites are asked to do now, and how far each of them is.

    Attributes:
        kind: the message type.
        round: the round.
        deadline_s: how long a site may take to reply.
        content: makes the messages.
        accept: receives each admitted reply before the next one is read.
        read: reads the tensors of replies that should carry some.
        began: when the phase began, on the server's clock.
        joinable_until: until when a site that joins is still asked.
        done: sites whose reply was admitted.
        failed: site -> why it has not contributed, of the sites that were asked and are not being waited for.
        retryable: those of them that may succeed if asked again.
        rejected: those of them whose reply the server rejected.
        attempts: site -> how often it was asked.
        retried: when sites were last asked again.
        reason: why the phase takes longer than usual, or empty.
        private: makes what one site alone is sent, in a secure sum; None if all are sent the same.
    """

    kind: str
    round: int
    deadline_s: float
    content: Content
    accept: Callable[[Admitted], None]
    read: Reader | None
    began: float
    joinable_until: float
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    retryable: set[str] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)
    attempts: dict[str, int] = field(default_factory=dict)
    retried: float = 0.0
    reason: str = ""
    private: Callable[[str], ConfigRecord] | None = None

    def fail(self, site: str, reason: str, retryable: bool) -> None:
        """Note that a site will not contribute unless it is asked again."""
        self.failed[site] = reason
        if retryable:
            self.retryable.add(site)


class Exchange:
    """Sends messages and handles whatever arrives during a phase: joins, replies and late replies.

    Args:
        plan: the study plan.
        mailbox: the messages in flight.
        roster: who takes part.
        folder: the run's record.
        clock: the server's clock.
        status: called with (phase, round, names of the sites being waited for, reason).
        join_content: makes the message that asks a node to join.
    """

    def __init__(
        self,
        plan: Plan,
        mailbox: Mailbox,
        roster: Roster,
        folder: RunFolder,
        clock: Clock,
        status: Callable[[str, int, list[str], str], None],
        join_content: Callable[[], RecordDict],
    ) -> None:
        self.plan, self.mailbox, self.roster, self.folder, self.clock = plan, mailbox, roster, folder, clock
        self._status, self._join_content = status, join_content
        self._phase: Phase | None = None
        self._refreshed: float | None = None
        self._rejections: dict[str, tuple[RejectionRule, int]] = {}
        self._came_online: Mapping[int, str] = {}
        self.round = 0
        self.note = ""

    @property
    def connected(self) -> list[int]:
        """The nodes that were connected at the last refresh."""
        return list(self._came_online)

    def begin(
        self,
        kind: str,
        number: int,
        content: Content,
        accept: Callable[[Admitted], None],
        read: Reader | None,
    ) -> Phase:
        """Open a phase: replies of this kind and round are handled from now on. No site has been asked yet."""
        now, waits = self.clock.now(), self.plan.aggregation
        deadline_s = waits.round_deadline_s
        if waits.secure is not None and kind in set(Stage):
            deadline_s = waits.secure.stage_deadline_s
        window = waits.rejoin_window_s if kind == MessageType.TRAIN else 0.0
        self.round = number
        self._phase = Phase(kind, number, deadline_s, content, accept, read, now, now + window)
        self._phase.retried = now
        self.refresh(at_once=True)
        return self._phase

    def end(self) -> None:
        """Close the phase; replies that still come are late."""
        if self._phase is not None:
            for sent in self.mailbox.awaited(self._phase.kind, self._phase.round):
                sent.expired = True
        self._phase = None

    def send(self, phase: Phase, site: str, node: int) -> None:
        """Message one site, at most `ATTEMPTS` times per phase."""
        if phase.attempts.get(site, 0) >= ATTEMPTS:
            return
        phase.attempts[site] = phase.attempts.get(site, 0) + 1
        phase.failed.pop(site, None)
        phase.retryable.discard(site)
        phase.rejected.discard(site)
        for earlier in self.mailbox.awaited(phase.kind, phase.round):
            earlier.expired = earlier.expired or earlier.site == site
        content = phase.content(site, self._rejections.pop(site, None))
        if phase.private is not None:
            content[SECURE_RECORD] = phase.private(site)
        if not self.mailbox.send(node, site, phase.kind, phase.round, content, phase.deadline_s):
            self._fail(phase, Failed(site, "Flower did not accept the message"))

    def poll(self) -> None:
        """Handle whatever has arrived; if nothing has, sleep for a moment."""
        self.refresh()
        received = False
        for sent, reply in self.mailbox.collect():
            received = True
            self._receive(sent, reply)
            self.report()
        for sent in self.mailbox.expire():
            self._time_out(sent)
        if not received:
            self.clock.sleep(POLL_S)

    def report(self) -> None:
        """Write to the run's status which sites are being waited for."""
        phase = self._phase
        if phase is None:
            retrying = {declined.site for declined in self.roster.retrying()}
            self._status("joining", self.round, sorted({*self.roster.absent(), *retrying}), self.note)
            return
        waiting = {sent.site for sent in self.mailbox.awaited(phase.kind, phase.round)}
        name = {MessageType.TRAIN: "training", MessageType.EVALUATE: "evaluating"}.get(phase.kind, "summing")
        if phase.reason:
            name = "waiting for sites"
            waiting |= set(self.roster.absent()) | phase.retryable
        self._status(name, phase.round, sorted(waiting), phase.reason)

    def refresh(self, at_once: bool = False) -> None:
        """Every few seconds, see which nodes are connected: record which sites have left, ask newcomers to join."""
        now = self.clock.now()
        if not at_once and self._refreshed is not None and now < self._refreshed + REFRESH_S:
            return
        self._refreshed = now
        before, self._came_online = self._came_online, self.mailbox.connected()
        restarted = {node for node in before if self._came_online.get(node, before[node]) != before[node]}
        for node in restarted:
            self.roster.forget_decline(node)
        for site, node in self.roster.joined.items():
            if node in restarted:
                self._reconnected(site, node)
        for site in self.roster.remove_disconnected(self.connected):
            self.folder.record("left", round=self.round, site=site, reason="its SuperNode is not connected")
        joining = {sent.node for sent in self.mailbox.unanswered(MessageType.QUERY)}
        for node in self.roster.newcomers(self.connected, self.round, now):
            if node not in joining:
                deadline = self.plan.aggregation.join_deadline_s
                self.mailbox.send(node, "", MessageType.QUERY, 0, self._join_content(), deadline)

    def _reconnected(self, site: str, node: int) -> None:
        """Handle a SuperNode that was offline for a moment: its messages are lost, and it has to join again."""
        reason = "its SuperNode was offline and is back"
        self.roster.leave(site)
        self.folder.record("left", round=self.round, site=site, reason=reason)
        phase = self._phase
        for sent in self.mailbox.awaited(phase.kind, phase.round) if phase is not None else ():
            if phase is not None and sent.node == node:
                sent.expired = True
                self._fail(phase, Failed(site, reason))

    def _receive(self, sent: SentMessage, reply: Message | None) -> None:
        phase = self._phase
        if reply is not None and reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            self._unreachable(sent)
        if sent.kind == MessageType.QUERY:
            self._join(sent, reply)
        elif sent.expired or phase is None or (sent.kind, sent.round) != (phase.kind, phase.round):
            if reply is not None and reply.has_content():
                content = {"round": sent.round, "site": sent.site, "kind": sent.kind}
                late_s = max(0.0, self.clock.now() - sent.deadline)
                self.folder.record("late", **content, seconds=round(late_s, 3))
        else:
            answer = self._admit(sent, reply, phase.read)
            if isinstance(answer, Admitted):
                phase.accept(answer)
                phase.done.add(sent.site)
            else:
                self._fail(phase, answer)

    def _join(self, sent: SentMessage, reply: Message | None) -> None:
        if reply is not None and reply.has_error() and reply.error.code in GONE:
            return  # asked again when it next connects
        answer = self._admit(sent, reply, None)
        if not isinstance(answer, Admitted):
            self._decline(sent, answer.site, answer.reason, answer.retryable)
            return
        again = self.roster.knows(answer.site)
        admitted = self.mailbox.registered(sent.node) in ("", answer.site)
        reason = self.roster.join(answer, sent.node, self.connected) if admitted else MISNAMED
        if reason is not None:
            self._decline(sent, answer.site, reason, transient=False)
            return
        about: dict[str, Any] = {COUNTS_WORD: BUCKETED_COUNTS} if answer.bucketed else {}
        event = "rejoined" if again else "joined"
        self.folder.record(event, round=self.round, site=answer.site, **about, **answer.scalars)
        self._include(answer.site, sent.node)

    def _decline(self, sent: SentMessage, site: str, reason: str, transient: bool) -> None:
        now = self.clock.now() if transient else None
        if self.roster.decline(sent.node, site, reason, self.round, now):
            self.folder.record("refused", round=self.round, kind=sent.kind, site=site, reason=reason)

    def _include(self, site: str, node: int) -> None:
        """Let a site that joins during training take part at once if the round is young or short of sites."""
        phase = self._phase
        if phase is None or phase.kind != MessageType.TRAIN or site in phase.done:
            return
        if self.clock.now() < phase.joinable_until and not self.roster.excluded(site, phase.round):
            self.send(phase, site, node)

    def _unreachable(self, sent: SentMessage) -> None:
        if sent.site and self.roster.joined.get(sent.site) == sent.node:
            self.roster.leave(sent.site)
            self.folder.record("left", round=self.round, site=sent.site, reason=UNREACHABLE)

    def _time_out(self, sent: SentMessage) -> None:
        phase = self._phase
        if phase is None or (sent.kind, sent.round) != (phase.kind, phase.round):
            return
        seconds = phase.deadline_s
        phase.fail(sent.site, f"no reply within {seconds:g} s", retryable=False)
        content = {"round": phase.round, "kind": phase.kind, "sites": 1, "names": [sent.site]}
        self.folder.record("silent", **content, seconds=seconds)

    def reject(self, phase: Phase, answer: Rejected) -> None:
        """Reject a reply after it was admitted, because it does not fit the others."""
        phase.done.discard(answer.site)
        self._fail(phase, answer)

    def _fail(self, phase: Phase, answer: NotAdmitted) -> None:
        rule = answer.rule if isinstance(answer, Rejected) else None
        content = {"round": phase.round, "kind": phase.kind, "site": answer.site, "reason": answer.reason}
        if phase.failed.get(answer.site) != answer.reason:
            self.folder.record("refused", **content, rule=rule)
        phase.fail(answer.site, answer.reason, answer.retryable)
        if rule is not None:
            phase.rejected.add(answer.site)
            self._rejections[answer.site] = (rule, phase.round)

    def _admit(self, sent: SentMessage, reply: Message | None, read: Reader | None) -> Admitted | NotAdmitted:
        if reply is None:
            answer: Admitted | NotAdmitted = Rejected("", "the reply cannot be read", RejectionRule.UNREADABLE)
        else:
            declared = self.roster.declared(sent.site)
            joined = None if declared is None else {sent.node: declared}
            answer = admit(reply, sent.kind, sent.round, self.plan, read, joined)
        if isinstance(answer, Admitted):
            return answer
        # A reply that is not admitted is booked under the name of the node's site, whatever name it carries itself.
        known = sent.site or self.mailbox.registered(sent.node)
        if known or reply is None or reply.has_error():
            return replace(answer, site=known or "(a site that has not joined)")
        return answer
