"""A reply is admitted, not trusted: from the right site, plan and round, with agreed names, counts and tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, MessageType
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from semisam_core.configuration import Name
from semisam_core.contract import (
    JOIN_SCALARS,
    METRICS_RECORD,
    REFUSAL_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    TRAIN_SCALARS,
    RefusalRule,
    RejectionRule,
    TensorSpec,
    evaluation_scalars,
    scalar_mistake,
)
from semisam_core.plan import Plan
from server.arrays import NotAdmittedError, read_tensors

REQUIRED: Mapping[str, Sequence[str]] = {
    MessageType.QUERY: ("labeled", "unlabeled", "validation", "quarantined"),
    MessageType.TRAIN: ("labeled", "unlabeled", "accepted", "confidence", "steps"),
    MessageType.EVALUATE: ("validation",),
}
_NAME = TypeAdapter(Name)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """A reply that may be used."""

    site: str
    scalars: dict[str, float]
    weights: dict[str, Tensor] | None


@dataclass(frozen=True)
class Rejected:
    """A reply that is left out, and why.

    Attributes:
        site: its name, or words that stand for one.
        reason: a sentence for the run's record.
        rule: what the site is told; None where it refused by itself, failed, or cannot be told apart.
    """

    site: str
    reason: str
    rule: RejectionRule | None = None


def admit(
    reply: Message,
    kind: str,
    round_number: int,
    plan: Plan,
    spec: Mapping[str, TensorSpec] | None,
    joined: Mapping[int, Admitted] | None = None,
) -> Admitted | Rejected:
    """Check a reply.

    Args:
        reply: as it came. Whatever reading it raises is a reason to leave it out.
        kind: the message type that was asked.
        round_number: the round that was asked about.
        plan: the study plan.
        spec: the agreed tensors where weights are due, else None.
        joined: what each node answered when it joined, by node; None while sites join.
    """
    if reply.has_error():
        return Rejected("(a site that failed)", f"Flower reports error code {reply.error.code}")
    site: str | None = None
    try:
        site = _site_name(reply)
        if site is None:
            return Rejected("(a site without a name)", "the reply names no site")
        if (refusal := reply.content.config_records.get(REFUSAL_RECORD)) is not None:
            rule = refusal.get("rule")
            known = {known.value for known in RefusalRule}
            return Rejected(site, f"refused by rule {rule if rule in known else 'unknown'}")
        declared = None if joined is None else _declared(reply, site, joined)
        _check_origin(reply, kind, round_number, plan)
        scalars = _scalars(reply, kind, plan)
        if declared is not None:
            _check_counts(scalars, kind, plan, declared)
        weights = None if spec is None else read_tensors(reply.content.array_records[SPECIALIST_RECORD], spec)
        return Admitted(site, scalars, weights)
    except NotAdmittedError as mistake:
        return Rejected(site or "(a site without a name)", str(mistake), mistake.rule)
    except Exception as error:  # records are unpacked when they are read, and hostile ones may raise anything
        logger.warning("A reply cannot be read", exc_info=error)
        reason = f"the reply cannot be read ({type(error).__name__})"
        return Rejected(site or "(a site without a name)", reason, RejectionRule.UNREADABLE)


def _site_name(reply: Message) -> str | None:
    about = reply.content.config_records.get(SITE_RECORD)
    try:
        return str(_NAME.validate_python(about.get("site"))) if about is not None else None
    except ValidationError:
        return None


def _declared(reply: Message, site: str, joined: Mapping[int, Admitted]) -> Mapping[str, float]:
    known = joined.get(reply.metadata.src_node_id)
    if known is None or known.site != site:
        raise NotAdmittedError(RejectionRule.ANOTHER_SITE, "the reply is not of the site that joined from its node")
    return known.scalars


def _check_origin(reply: Message, kind: str, round_number: int, plan: Plan) -> None:
    about = reply.content.config_records[SITE_RECORD]
    number = about.get("round")
    if type(number) is not int or number != round_number or about.get("plan-hash") != plan.hash:
        raise NotAdmittedError(RejectionRule.ANOTHER_ROUND, "the reply is about another round or plan")
    due = {SITE_RECORD, METRICS_RECORD} | ({SPECIALIST_RECORD} if kind == MessageType.TRAIN else set())
    if missing := sorted(due - set(reply.content)):
        words = {METRICS_RECORD: "scalars", SPECIALIST_RECORD: "specialist"}
        raise NotAdmittedError(RejectionRule.RECORDS, f"the reply has no {words[missing[0]]}")
    if foreign := sorted(set(reply.content) - due):
        shown = [name[:60] for name in foreign[:3]]
        raise NotAdmittedError(RejectionRule.RECORDS, f"the reply has records that are not agreed: {shown}")


def _scalars(reply: Message, kind: str, plan: Plan) -> dict[str, float]:
    scalars = dict(reply.content.metric_records[METRICS_RECORD])
    agreed = {
        MessageType.QUERY: JOIN_SCALARS,
        MessageType.TRAIN: TRAIN_SCALARS,
        MessageType.EVALUATE: evaluation_scalars(plan),
    }[kind]
    mistake = next(filter(None, (scalar_mistake(name, value) for name, value in scalars.items())), None)
    if foreign := sorted(set(scalars) - set(agreed)):
        mistake = f"the scalars {[name[:60] for name in foreign[:5]]} are not on the agreed list"
    elif missing := sorted(set(REQUIRED[kind]) - set(scalars)):
        mistake = f"the scalars {missing} are missing"
    if mistake:
        raise NotAdmittedError(RejectionRule.SCALARS, mistake)
    return {name: float(value) for name, value in scalars.items() if isinstance(value, int | float)}


def _check_counts(scalars: Mapping[str, float], kind: str, plan: Plan, declared: Mapping[str, float]) -> None:
    """Check claims against what the site declared when it joined; a quarantined scan may have been repaired since."""
    roles = {MessageType.TRAIN: ("labeled", "unlabeled"), MessageType.EVALUATE: ("validation",)}.get(kind, ())
    limits = [(role, scalars[role], declared[role] + declared["quarantined"]) for role in roles]
    if kind == MessageType.TRAIN:
        scans = sum(declared[name] for name in ("labeled", "unlabeled", "quarantined"))
        pairs = scalars["unlabeled"] * len(plan.class_names) if plan.pseudo_labels is not None else 0.0
        limits += [
            ("labeled + unlabeled", scalars["labeled"] + scalars["unlabeled"], scans),
            ("accepted + gated", scalars["accepted"] + scalars.get("gated", 0.0), pairs),
            ("steps", scalars["steps"], plan.training.steps_per_round),
        ]
    if kind == MessageType.EVALUATE:
        cases = [name for name in scalars if name.partition(".")[0] in ("cases", "missing_distances")]
        limits += [(name, scalars[name], scalars["validation"]) for name in cases]
    for name, found, most in limits:
        if found > most:
            raise NotAdmittedError(RejectionRule.COUNTS, f"{name} is {found:g}, and can be {most:g} at most")
