"""A reply is admitted, not trusted: from the right plan and round, agreed names, finite numbers, agreed tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Message, MessageType
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from semisam_core.agreement import (
    JOIN_SCALARS,
    METRICS_RECORD,
    REFUSAL_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    TRAIN_SCALARS,
    RefusalRule,
    TensorSpec,
    disagreement,
    evaluation_scalars,
    scalar_mistake,
)
from semisam_core.configuration import Name
from semisam_core.plan import Plan

REQUIRED: Mapping[str, Sequence[str]] = {
    MessageType.QUERY: ("labeled", "unlabeled", "validation", "quarantined"),
    MessageType.TRAIN: ("labeled", "unlabeled", "accepted", "confidence", "steps"),
    MessageType.EVALUATE: ("validation",),
}
_NAME = TypeAdapter(Name)


@dataclass(frozen=True)
class Admitted:
    """A reply that may be used."""

    site: str
    scalars: dict[str, float]
    weights: dict[str, Tensor] | None


@dataclass(frozen=True)
class Rejected:
    """A reply that is left out, and why."""

    site: str
    reason: str


def admit(
    reply: Message, kind: str, round_number: int, plan: Plan, spec: Mapping[str, TensorSpec] | None
) -> Admitted | Rejected:
    """Check a reply.

    Args:
        reply: as it came.
        kind: the message type that was asked.
        round_number: the round that was asked about.
        plan: the study plan.
        spec: the agreed tensors where weights are due, else None.
    """
    if reply.has_error():
        return Rejected("(a site that failed)", f"Flower reports error code {reply.error.code}")
    site = _site_name(reply)
    if site is None:
        return Rejected("(a site without a name)", "the reply names no site")
    if (refusal := reply.content.config_records.get(REFUSAL_RECORD)) is not None:
        rule = refusal.get("rule")
        known = {known.value for known in RefusalRule}
        return Rejected(site, f"refused by rule {rule if rule in known else 'unknown'}")
    about = reply.content.config_records[SITE_RECORD]
    if about.get("round") != round_number or about.get("plan-hash") != plan.hash:
        return Rejected(site, "the reply is about another round or plan")
    scalars = reply.content.metric_records.get(METRICS_RECORD)
    if scalars is None:
        return Rejected(site, "the reply has no scalars")
    if mistake := _scalar_mistake(dict(scalars), kind, plan):
        return Rejected(site, mistake)
    values = {name: float(value) for name, value in scalars.items() if isinstance(value, int | float)}
    if spec is None:
        return Admitted(site, values, None)
    record = reply.content.array_records.get(SPECIALIST_RECORD)
    if record is None:
        return Rejected(site, "the reply has no specialist")
    try:
        weights = {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
    except (ValueError, TypeError):
        return Rejected(site, "the specialist's tensors cannot be read")
    if mistake := disagreement(weights, spec):
        return Rejected(site, mistake)
    return Admitted(site, values, weights)


def _site_name(reply: Message) -> str | None:
    about = reply.content.config_records.get(SITE_RECORD)
    try:
        return str(_NAME.validate_python(about.get("site"))) if about is not None else None
    except ValidationError:
        return None


def _scalar_mistake(scalars: Mapping[str, object], kind: str, plan: Plan) -> str | None:
    agreed = {
        MessageType.QUERY: JOIN_SCALARS,
        MessageType.TRAIN: TRAIN_SCALARS,
        MessageType.EVALUATE: evaluation_scalars(plan),
    }[kind]
    if foreign := sorted(set(scalars) - set(agreed)):
        return f"the scalars {foreign[:5]} are not on the agreed list"
    if missing := sorted(set(REQUIRED[kind]) - set(scalars)):
        return f"the scalars {missing} are missing"
    return next(filter(None, (scalar_mistake(name, value) for name, value in scalars.items())), None)
