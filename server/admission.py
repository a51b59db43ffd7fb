"""Admission of replies: each must come from the right site, plan and round, with agreed names, counts and tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Error, Message, MessageType
from flwr.common.constant import ErrorCode
from torch import Tensor

from semisam_core.configuration import is_name
from semisam_core.contract import (
    BUCKETED_COUNTS,
    COUNTS_WORD,
    EXACT_COUNTS,
    JOIN_SCALARS,
    METRICS_RECORD,
    REFUSAL_RECORD,
    SECURE_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    SPLIT_HASH,
    TRANSIENT_REFUSALS,
    RefusalRule,
    RejectionRule,
    Stage,
    counts_patients,
    evaluation_scalars,
    is_sha256,
    material_mistake,
    scalar_mistake,
    train_scalars,
)
from semisam_core.plan import Plan
from semisam_core.small_numbers import BUCKETS, bucket_middle, bucket_top
from server.arrays import NotAdmittedError, Reader

REQUIRED: Mapping[str, Sequence[str]] = {
    MessageType.QUERY: ("labeled", "unlabeled", "validation", "quarantined"),
    MessageType.TRAIN: ("labeled", "unlabeled", "accepted", "steps"),
    MessageType.EVALUATE: ("validation",),
}
SPLIT_CHANGED = "the site's split by patient is not the one that it joined with"
NAMELESS = "(a site without a name)"
UNREACHABLE = "its SuperNode has stopped sending heartbeats"
ERROR_WORDS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its ClientApp could not be loaded",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its ClientApp raised an error",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp was killed",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message expired or was lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the reply expired or was lost",
    ErrorCode.NODE_UNAVAILABLE: UNREACHABLE,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """A reply that may be used.

    Attributes:
        site: its name.
        scalars: the agreed scalars.
        weights: the agreed tensors, if it carries any.
        split: the keyed hash of the site's split by patient.
        material: the keys or shares of a secure sum's stage.
        bucketed: whether the site's counts of scans are the lowest of a bucket (`small_numbers.BUCKETS`).
    """

    site: str
    scalars: dict[str, float]
    weights: dict[str, Tensor] | None
    split: str | None = None
    material: Mapping[str, bytes] = field(default_factory=dict)
    bucketed: bool = False

    @property
    def estimates(self) -> dict[str, float]:
        """The scalars, with the middle of its bucket for each count that is in one: what weights are made from."""
        if not self.bucketed:
            return self.scalars
        return {
            name: bucket_middle(int(value)) if counts_patients(name) else value for name, value in self.scalars.items()
        }


@dataclass(frozen=True)
class Refused:
    """A site's refusal to act on a message.

    Attributes:
        site: its name.
        rule: the site's word for why; None if it is not one of the agreed words.
    """

    site: str
    rule: RefusalRule | None

    @property
    def reason(self) -> str:
        """A sentence for the run's record."""
        return f"refused by rule {self.rule.value if self.rule is not None else 'unknown'}"

    @property
    def retryable(self) -> bool:
        """Whether the same message may succeed later."""
        return self.rule in TRANSIENT_REFUSALS


@dataclass(frozen=True)
class Rejected:
    """A reply that the server does not use.

    Attributes:
        site: its name, or words in place of one.
        reason: a sentence for the run's record.
        rule: the word that the site is sent.
    """

    site: str
    reason: str
    rule: RejectionRule

    @property
    def retryable(self) -> bool:
        """Whether the same message may succeed later: a site that breaks the contract will do so again."""
        return False


@dataclass(frozen=True)
class Failed:
    """A message without a reply: the site, its connection or Flower failed.

    Attributes:
        site: its name, or words in place of one.
        reason: a sentence for the run's record.
    """

    site: str
    reason: str

    @property
    def retryable(self) -> bool:
        """Whether the same message may succeed later."""
        return True


NotAdmitted = Refused | Rejected | Failed


def admit(
    reply: Message,
    kind: str,
    round_number: int,
    plan: Plan,
    read: Reader | None,
    joined: Mapping[int, Admitted] | None = None,
) -> Admitted | NotAdmitted:
    """Check a reply. Whatever reading it raises is a reason to reject it.

    Args:
        reply: the reply as it arrived.
        kind: the type of the message it answers.
        round_number: the round of the message it answers.
        plan: the study plan.
        read: reads the tensors if the reply should carry some, else None.
        joined: node -> the reply with which its site joined; None while sites join.
    """
    if reply.has_error():
        return _failure(reply.error)
    site: str | None = None
    try:
        site = _site_name(reply)
        if (refusal := reply.content.config_records.get(REFUSAL_RECORD)) is not None and site is not None:
            return Refused(site, _refusal_rule(refusal.get("rule")))
        if site is None:
            raise NotAdmittedError(RejectionRule.RECORDS, "the reply names no site")
        declared = None if joined is None else _declared(reply, site, joined)
        _check_origin(reply, kind, round_number, plan, with_tensors=read is not None)
        split, scalars = _split(reply, declared), _scalars(reply, kind, plan)
        bucketed = _bucketed(reply) if declared is None else declared.bucketed
        if bucketed:
            _check_buckets(scalars)
        if declared is not None:
            _check_counts(scalars, kind, plan, declared)
        weights = None if read is None else read(reply.content.array_records[SPECIALIST_RECORD])
        return Admitted(site, scalars, weights, split, _material(reply, kind), bucketed)
    except NotAdmittedError as mistake:
        return Rejected(site or NAMELESS, str(mistake), mistake.rule)
    except Exception as error:  # records are unpacked when read, and hostile ones may raise anything
        logger.warning("A reply cannot be read", exc_info=error)
        reason = f"the reply cannot be read ({type(error).__name__})"
        return Rejected(site or NAMELESS, reason, RejectionRule.UNREADABLE)


def _failure(error: Error) -> Refused | Failed:
    """Return what an error reply means: a site that cannot send records refuses by a word in the error's reason."""
    if (rule := _refusal_rule(error.reason)) is not None:
        return Refused(NAMELESS, rule)
    return Failed(NAMELESS, f"{ERROR_WORDS.get(error.code, 'it failed')} (Flower's error code {error.code})")


def _refusal_rule(word: object) -> RefusalRule | None:
    return next((rule for rule in RefusalRule if rule.value == word), None)


def _site_name(reply: Message) -> str | None:
    about = reply.content.config_records.get(SITE_RECORD)
    name = None if about is None else about.get("site")
    return name if is_name(name) else None


def _declared(reply: Message, site: str, joined: Mapping[int, Admitted]) -> Admitted:
    known = joined.get(reply.metadata.src_node_id)
    if known is None or known.site != site:
        raise NotAdmittedError(RejectionRule.ANOTHER_SITE, "the reply is not from the site that joined from its node")
    return known


def _check_origin(reply: Message, kind: str, round_number: int, plan: Plan, with_tensors: bool) -> None:
    about = reply.content.config_records[SITE_RECORD]
    number = about.get("round")
    if type(number) is not int or number != round_number or about.get("plan-hash") != plan.hash:
        raise NotAdmittedError(RejectionRule.ANOTHER_ROUND, "the reply is about another round or plan")
    agreed = {SITE_RECORD, METRICS_RECORD} | ({SPECIALIST_RECORD} if with_tensors else set())
    agreed |= {SECURE_RECORD} if kind in set(Stage) - {Stage.MASKED} else set()
    if missing := sorted(agreed - set(reply.content)):
        words = {METRICS_RECORD: "scalars", SPECIALIST_RECORD: "specialist", SECURE_RECORD: "keys or shares"}
        raise NotAdmittedError(RejectionRule.RECORDS, f"the reply has no {words[missing[0]]}")
    if foreign := sorted(set(reply.content) - agreed):
        shown = [name[:60] for name in foreign[:3]]
        raise NotAdmittedError(RejectionRule.RECORDS, f"the reply has records that are not on the agreed list: {shown}")


def _split(reply: Message, joined: Admitted | None) -> str | None:
    """Return the hash of the site's split, which must be the one that it joined with."""
    split = reply.content.config_records[SITE_RECORD].get(SPLIT_HASH)
    if split is not None and not is_sha256(split):
        raise NotAdmittedError(RejectionRule.RECORDS, "the hash of the site's split is no SHA-256")
    if joined is not None and split != joined.split:
        raise NotAdmittedError(RejectionRule.SPLIT_CHANGED, SPLIT_CHANGED)
    return None if split is None else str(split)


def _material(reply: Message, kind: str) -> dict[str, bytes]:
    """Return the keys or shares of a secure sum's stage; empty for all other replies."""
    if kind not in set(Stage) - {Stage.MASKED}:
        return {}
    material = dict(reply.content.config_records[SECURE_RECORD])
    if mistake := material_mistake(Stage(kind), material):
        raise NotAdmittedError(RejectionRule.SECURE, mistake)
    return {name: value for name, value in material.items() if isinstance(value, bytes)}


def _scalars(reply: Message, kind: str, plan: Plan) -> dict[str, float]:
    scalars = dict(reply.content.metric_records[METRICS_RECORD])
    agreed = {
        MessageType.QUERY: JOIN_SCALARS,
        MessageType.TRAIN: train_scalars(plan),
        MessageType.EVALUATE: evaluation_scalars(plan),
    }.get(kind, ())
    mistake = next(filter(None, (scalar_mistake(name, value) for name, value in scalars.items())), None)
    if foreign := sorted(set(scalars) - set(agreed)):
        mistake = f"the scalars {[name[:60] for name in foreign[:5]]} are not on the agreed list"
    elif missing := sorted(set(REQUIRED.get(kind, ())) & set(agreed) - set(scalars)):
        mistake = f"the scalars {missing} are missing"
    if mistake:
        raise NotAdmittedError(RejectionRule.SCALARS, mistake)
    return {name: float(value) for name, value in scalars.items() if isinstance(value, int | float)}


def _bucketed(reply: Message) -> bool:
    """Return whether a site that joins will send counts of scans in buckets."""
    word = reply.content.config_records[SITE_RECORD].get(COUNTS_WORD, EXACT_COUNTS)
    if word not in (EXACT_COUNTS, BUCKETED_COUNTS):
        raise NotAdmittedError(RejectionRule.RECORDS, "the word on how the site counts is not an agreed one")
    return word == BUCKETED_COUNTS


def _check_buckets(scalars: Mapping[str, float]) -> None:
    foreign = [name for name, value in scalars.items() if counts_patients(name) and value not in BUCKETS]
    if foreign:
        reason = f"{foreign[0]} is {scalars[foreign[0]]:g}, which begins no bucket, from a site that sends buckets"
        raise NotAdmittedError(RejectionRule.COUNTS, reason)


def _check_counts(scalars: Mapping[str, float], kind: str, plan: Plan, joined: Admitted) -> None:
    """Compare counts with what the site declared when it joined; quarantined scans may have been repaired since.

    Scans become labeled, and unlabeled again, as people at the site review them, so only their sum is compared. A count
    in a bucket may be any of the bucket: what it limits is compared with the bucket's highest.
    """

    def most(count: float) -> float:
        return bucket_top(int(count)) if joined.bucketed else count

    declared = {name: most(count) for name, count in joined.scalars.items()}
    roles = ("validation",) if kind == MessageType.EVALUATE else ()
    limits = [(role, scalars[role], declared[role] + declared["quarantined"]) for role in roles]
    if kind == MessageType.TRAIN:
        scans = sum(declared[name] for name in ("labeled", "unlabeled", "quarantined"))
        pairs = most(scalars["unlabeled"]) * len(plan.class_names) if plan.pseudo_labels is not None else 0.0
        limits += [
            ("labeled + unlabeled", scalars["labeled"] + scalars["unlabeled"], scans),
            ("accepted + gated", scalars.get("accepted", 0.0) + scalars.get("gated", 0.0), pairs),
            ("steps", scalars["steps"], plan.training.steps_per_round),
            ("head_steps", scalars.get("head_steps", 0.0), _head_steps(plan)),
        ]
    if kind == MessageType.EVALUATE:
        cases = [name for name in scalars if name.partition(".")[0] in ("cases", "missing_distances")]
        limits += [(name, scalars[name], most(scalars["validation"])) for name in cases]
    for name, found, limit in limits:
        if found > limit:
            raise NotAdmittedError(RejectionRule.COUNTS, f"{name} is {found:g} but can be at most {limit:g}")


def _head_steps(plan: Plan) -> int:
    """Return how many steps a site's feature head takes in a round."""
    head = None if plan.pseudo_labels is None else plan.pseudo_labels.sources.feature_head
    return 0 if head is None else head.steps_per_round
