"""Asking sites and receiving their answers: one at a time, until a deadline, whatever each of them does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from semisam_core.contract import RefusalRule, RejectionRule, TensorSpec
from semisam_core.plan import Plan
from server.admission import Admitted, Rejected, admit
from server.messages import Clock, Mailbox, SentMessage
from server.roster import Roster
from server.run_folder import RunFolder

POLL_S = 0.5
LOOK_S = 2.0
RETRY_S = 30.0
ATTEMPTS = 3
MISNAMED = "its key was admitted under another name"
UNREACHABLE = "its SuperNode has stopped sending heartbeats"
GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)
MAY_PASS = ("refused by rule storage",)

# Makes a message to a site; the rule by which its last answer was rejected and the round of that, where it was.
Content = Callable[[tuple[RejectionRule, int] | None], RecordDict]

ERROR_WORDS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its ClientApp could not be loaded",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its ClientApp gave up",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp was killed",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message expired or was lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the reply expired or was lost",
    ErrorCode.NODE_UNAVAILABLE: UNREACHABLE,
}


@dataclass
class Phase:
    """What is asked of sites now, and who has done what.

    Attributes:
        kind: the message type.
        round: the round.
        deadline_s: how long each is waited for.
        content: makes the messages.
        accept: takes each admitted answer, before the next one is read.
        spec: the agreed tensors where weights are due.
        began: when, on the server's clock.
        joinable_until: until when a site that joins meanwhile is still asked.
        done: sites whose answer was admitted.
        failed: site -> why it has not contributed, of those that were asked and are not waited for.
        may_pass: those of them that may do better if asked again.
        rejected: those of them that answered, and were rejected by a rule of the server's.
        attempts: site -> how often it was asked.
        retried: when sites were last asked again.
        reason: why it takes longer, where it does.
    """

    kind: str
    round: int
    deadline_s: float
    content: Content
    accept: Callable[[Admitted], None]
    spec: Mapping[str, TensorSpec] | None
    began: float
    joinable_until: float
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    may_pass: set[str] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)
    attempts: dict[str, int] = field(default_factory=dict)
    retried: float = 0.0
    reason: str = ""

    def fail(self, site: str, reason: str, may_pass: bool) -> None:
        """Note that a site will not contribute unless it is asked again."""
        self.failed[site] = reason
        if may_pass:
            self.may_pass.add(site)


class Reception:
    """The server's ear: hears joins, answers and late answers while a phase runs.

    Args:
        plan: the study plan.
        post: the sent_messages under way.
        roster: who takes part.
        folder: the run's record.
        clock: the server's clock.
        status: called with (phase, round, names of sites that are waited for, reason).
        join_content: makes the message by which a node is asked to join.
    """

    def __init__(
        self,
        plan: Plan,
        post: Mailbox,
        roster: Roster,
        folder: RunFolder,
        clock: Clock,
        status: Callable[[str, int, list[str], str], None],
        join_content: Callable[[], RecordDict],
    ) -> None:
        self.plan, self.post, self.roster, self.folder, self.clock = plan, post, roster, folder, clock
        self._status, self._join_content = status, join_content
        self._phase: Phase | None = None
        self._looked: float | None = None
        self._rejections: dict[str, tuple[RejectionRule, int]] = {}
        self._came_online: Mapping[int, str] = {}
        self.round = 0
        self.note = ""

    @property
    def connected(self) -> list[int]:
        """The nodes that were connected when the server last looked."""
        return list(self._came_online)

    def begin(
        self,
        kind: str,
        number: int,
        content: Content,
        accept: Callable[[Admitted], None],
        spec: Mapping[str, TensorSpec] | None,
    ) -> Phase:
        """Open a phase: from now on answers of this kind and round are taken in; nobody is asked yet."""
        now, waits = self.clock.now(), self.plan.aggregation
        window = waits.rejoin_window_s if kind == MessageType.TRAIN else 0.0
        self.round = number
        self._phase = Phase(kind, number, waits.round_deadline_s, content, accept, spec, now, now + window)
        self._phase.retried = now
        self.look(at_once=True)
        return self._phase

    def end(self) -> None:
        """Close the phase; whoever is still at work is late from now on."""
        if self._phase is not None:
            for sent in self.post.under_way(self._phase.kind, self._phase.round):
                sent.over = True
        self._phase = None

    def ask(self, phase: Phase, site: str, node: int) -> None:
        """Ask one site, in a phase, at most so often."""
        if phase.attempts.get(site, 0) >= ATTEMPTS:
            return
        phase.attempts[site] = phase.attempts.get(site, 0) + 1
        phase.failed.pop(site, None)
        phase.may_pass.discard(site)
        phase.rejected.discard(site)
        for earlier in self.post.under_way(phase.kind, phase.round):
            earlier.over = earlier.over or earlier.site == site
        content = phase.content(self._rejections.pop(site, None))
        if not self.post.ask(node, site, phase.kind, phase.round, content, phase.deadline_s):
            self._failure(phase, Rejected(site, "Flower did not take the message"), may_pass=True)

    def turn(self) -> None:
        """Take in what there is; where there is nothing, wait a moment."""
        self.look()
        heard = False
        for sent, reply in self.post.sweep():
            heard = True
            self._receive(sent, reply)
            self.tell()
        for sent in self.post.overdue():
            self._overdue(sent)
        if not heard:
            self.clock.sleep(POLL_S)

    def tell(self) -> None:
        """Say in the run's status what is waited for."""
        phase = self._phase
        if phase is None:
            self._status("joining", self.round, self.roster.absent(), self.note)
            return
        waiting = {sent.site for sent in self.post.under_way(phase.kind, phase.round)}
        name = "training" if phase.kind == MessageType.TRAIN else "evaluating"
        if phase.reason:
            name = "waiting for sites"
            waiting |= set(self.roster.absent()) | phase.may_pass
        self._status(name, phase.round, sorted(waiting), phase.reason)

    def look(self, at_once: bool = False) -> None:
        """See who is connected, every few seconds: note who has gone, ask who is new to join."""
        now = self.clock.now()
        if not at_once and self._looked is not None and now < self._looked + LOOK_S:
            return
        self._looked = now
        before, self._came_online = self._came_online, self.post.connected()
        for site, node in self.roster.joined.items():
            if node in before and self._came_online.get(node, before[node]) != before[node]:
                self._started_again(site, node)
        for site in self.roster.gone(self.connected):
            self.folder.record("left", round=self.round, site=site, reason="its SuperNode is not connected")
        joining = {sent.node for sent in self.post.asked(MessageType.QUERY)}
        for node in self.roster.newcomers(self.connected, self.round):
            if node not in joining:
                deadline = self.plan.aggregation.join_deadline_s
                self.post.ask(node, "", MessageType.QUERY, 0, self._join_content(), deadline)

    def _started_again(self, site: str, node: int) -> None:
        """Note that a SuperNode was offline for a moment: what it was asked is lost, and it has to join again."""
        reason = "its SuperNode was offline and is back"
        self.roster.leave(site)
        self.folder.record("left", round=self.round, site=site, reason=reason)
        phase = self._phase
        for sent in self.post.under_way(phase.kind, phase.round) if phase is not None else ():
            if phase is not None and sent.node == node:
                sent.over = True
                self._failure(phase, Rejected(site, reason), may_pass=True)

    def _receive(self, sent: SentMessage, reply: Message | None) -> None:
        phase = self._phase
        if reply is not None and reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            self._unreachable(sent)
        if sent.kind == MessageType.QUERY:
            self._join(sent, reply)
        elif sent.over or phase is None or (sent.kind, sent.round) != (phase.kind, phase.round):
            if reply is not None and reply.has_content():
                content = {"round": sent.round, "site": sent.site, "kind": sent.kind}
                self.folder.record("late", **content, seconds=round(max(0.0, self.clock.now() - sent.due), 3))
        else:
            answer = self._admit(sent, reply, phase.spec)
            if isinstance(answer, Admitted):
                phase.accept(answer)
                phase.done.add(sent.site)
            else:
                failed = reply is not None and reply.has_error()
                self._failure(phase, answer, failed or answer.reason in MAY_PASS)

    def _join(self, sent: SentMessage, reply: Message | None) -> None:
        if reply is not None and reply.has_error() and reply.error.code in GONE:
            return  # asked again when it is next seen
        answer, again = self._admit(sent, reply, None), False
        if isinstance(answer, Rejected):
            reason: str | None = answer.reason
        else:
            again = self.roster.knows(answer.site)
            admitted = self.post.registered(sent.node) in ("", answer.site)
            reason = self.roster.join(answer, sent.node, self.connected) if admitted else MISNAMED
        if reason is not None:
            if self.roster.decline(sent.node, answer.site, reason, self.round):
                self.folder.record("refused", round=self.round, kind=sent.kind, site=answer.site, reason=reason)
            return
        scalars = answer.scalars if isinstance(answer, Admitted) else {}
        self.folder.record("rejoined" if again else "joined", round=self.round, site=answer.site, **scalars)
        self._ask_joined(answer.site, sent.node)

    def _ask_joined(self, site: str, node: int) -> None:
        """Let a site that joins while others train take part at once, if the round is young or short of sites."""
        phase = self._phase
        if phase is None or phase.kind != MessageType.TRAIN or site in phase.done:
            return
        if self.clock.now() < phase.joinable_until and not self.roster.left_out(site, phase.round):
            self.ask(phase, site, node)

    def _unreachable(self, sent: SentMessage) -> None:
        if sent.site and self.roster.joined.get(sent.site) == sent.node:
            self.roster.leave(sent.site)
            self.folder.record("left", round=self.round, site=sent.site, reason=UNREACHABLE)

    def _overdue(self, sent: SentMessage) -> None:
        phase = self._phase
        if phase is None or (sent.kind, sent.round) != (phase.kind, phase.round):
            return
        seconds = phase.deadline_s
        phase.fail(sent.site, f"no answer within {seconds:g} s", may_pass=False)
        content = {"round": phase.round, "kind": phase.kind, "sites": 1, "names": [sent.site]}
        self.folder.record("silent", **content, seconds=seconds)

    def reject(self, phase: Phase, answer: Rejected) -> None:
        """Take back an answer that was admitted at first, as it does not fit the others."""
        phase.done.discard(answer.site)
        self._failure(phase, answer, may_pass=False)

    def _failure(self, phase: Phase, answer: Rejected, may_pass: bool) -> None:
        content = {"round": phase.round, "kind": phase.kind, "site": answer.site, "reason": answer.reason}
        if phase.failed.get(answer.site) != answer.reason:
            self.folder.record("refused", **content, rule=answer.rule)
        phase.fail(answer.site, answer.reason, may_pass)
        if answer.rule is not None:
            phase.rejected.add(answer.site)
            self._rejections[answer.site] = (answer.rule, phase.round)

    def _admit(
        self, sent: SentMessage, reply: Message | None, spec: Mapping[str, TensorSpec] | None
    ) -> Admitted | Rejected:
        name = sent.site or "(a site that has not joined)"
        if reply is None:
            return Rejected(name, "the reply cannot be read", RejectionRule.UNREADABLE)
        if reply.has_error():
            return Rejected(name, _why(reply.error))
        declared = self.roster.declared(sent.site)
        joined = None if declared is None else {sent.node: declared}
        answer = admit(reply, sent.kind, sent.round, self.plan, spec, joined)
        if isinstance(answer, Rejected) and sent.site:
            return replace(answer, site=sent.site)  # whatever name it bears
        return answer


def _why(error: Error) -> str:
    if error.reason in {rule.value for rule in RefusalRule}:
        return f"refused by rule {error.reason}"
    return f"{ERROR_WORDS.get(error.code, 'it failed')} (Flower's error code {error.code})"
