"""Which replies may count, and why one may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from semisam_core.contract import RejectionRule, specialist_spec
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.admission import Admitted, Rejected, admit

SCALARS = {"labeled": 1, "unlabeled": 2, "accepted": 0, "confidence": 0.5, "steps": 2, "loss.supervised": -0.5}


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0


def _records(plan: Plan) -> dict[str, Any]:
    weights = new_specialist(plan).state_dict()
    return {
        "metrics": MetricRecord(dict(SCALARS)),
        "site": ConfigRecord({"site": "alpha", "round": 1, "plan-hash": plan.hash}),
        "specialist": ArrayRecord({name: Array(value.numpy()) for name, value in weights.items()}),
    }


def _admit(plan: Plan, content: dict[str, Any] | Error) -> Admitted | Rejected:
    asked = Message(RecordDict(), 7, MessageType.TRAIN)
    reply = Message(content if isinstance(content, Error) else RecordDict(content), reply_to=asked)
    return admit(reply, MessageType.TRAIN, 1, plan, specialist_spec(plan))


def _admit_scores(plan: Plan, scores: dict[str, float]) -> Admitted | Rejected:
    content = {"metrics": MetricRecord(dict(scores)), "site": _records(plan)["site"]}
    reply = Message(RecordDict(content), reply_to=Message(RecordDict(), 7, MessageType.EVALUATE))
    return admit(reply, MessageType.EVALUATE, 1, plan, None)


def test_a_good_reply_is_admitted_as_it_came(plan: Plan) -> None:
    answer = _admit(plan, _records(plan))
    assert isinstance(answer, Admitted)
    assert answer.site == "alpha"
    assert answer.scalars == SCALARS
    assert answer.weights is not None
    expected = new_specialist(plan).state_dict()
    assert all(torch.equal(answer.weights[name], expected[name]) for name in expected)


def test_an_error_reply_is_rejected_without_its_text(plan: Plan) -> None:
    answer = _admit(plan, Error(2, "secret text"))
    assert isinstance(answer, Rejected)
    assert "secret" not in answer.reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"site": None}, "names no site"),
        ({"site": ConfigRecord({"site": "../x", "round": 1})}, "names no site"),
        ({"site": ConfigRecord({"site": "alpha", "round": 2, "plan-hash": "?"})}, "another round or plan"),
        ({"refusal": ConfigRecord({"rule": "storage"})}, "refused by rule storage"),
        ({"refusal": ConfigRecord({"rule": "<script>"})}, "refused by rule unknown"),
        ({"metrics": None}, "no scalars"),
        ({"metrics": MetricRecord(SCALARS | {"patients": 3})}, "not on the agreed list"),
        ({"metrics": MetricRecord({"labeled": 1})}, "are missing"),
        ({"metrics": MetricRecord(SCALARS | {"seconds": float("nan")})}, "seconds is not a finite number"),
        ({"metrics": MetricRecord(SCALARS | {"labeled": [1, 2]})}, "labeled is not a finite number"),
        ({"metrics": MetricRecord(SCALARS | {"labeled": -1})}, "labeled is negative"),
        ({"metrics": MetricRecord(SCALARS | {"accepted": 1.5})}, "accepted is a count and not a whole number"),
        ({"metrics": MetricRecord(SCALARS | {"labeled": 1e300})}, "labeled is a count and not a whole number"),
        ({"metrics": MetricRecord(SCALARS | {"gated.empty": 0.5})}, "gated.empty is a count and not a whole number"),
        ({"metrics": MetricRecord(SCALARS | {"confidence": 1.01})}, "confidence is a share and above 1"),
        ({"metrics": MetricRecord(SCALARS | {"confidence": -0.01})}, "confidence is negative"),
        ({"metrics": MetricRecord(SCALARS | {"confidence": float("nan")})}, "confidence is not a finite number"),
        ({"metrics": MetricRecord({k: v for k, v in SCALARS.items() if k != "confidence"})}, "are missing"),
        ({"specialist": None}, "no specialist"),
        ({"specialist": ArrayRecord({"x": Array(torch.ones(2).numpy())})}, "agreed tensors are missing"),
    ],
)
def test_a_reply_that_is_not_as_agreed_is_rejected_with_the_reason(
    plan: Plan, change: dict[str, Any], says: str
) -> None:
    records = {name: record for name, record in (_records(plan) | change).items() if record is not None}
    answer = _admit(plan, records)
    assert isinstance(answer, Rejected)
    assert says in answer.reason


@pytest.mark.parametrize("confidence", [0, 0.0, 1, 1.0])
def test_a_confidence_at_either_end_is_admitted(plan: Plan, confidence: float) -> None:
    answer = _admit(plan, _records(plan) | {"metrics": MetricRecord(SCALARS | {"confidence": confidence})})
    assert isinstance(answer, Admitted)
    assert answer.scalars["confidence"] == confidence


@pytest.mark.parametrize(
    ("scalars", "says"),
    [
        ({"dice.blob": 1.5}, "dice.blob is a share and above 1"),
        ({"surface_dice.blob": 100.0}, "surface_dice.blob is a share and above 1"),
        ({"cases.blob": 0.5}, "cases.blob is a count and not a whole number"),
        ({"hd95_mm.blob": -1.0}, "hd95_mm.blob is negative"),
    ],
)
def test_a_score_that_cannot_be_is_rejected(plan: Plan, scalars: dict[str, float], says: str) -> None:
    answer = _admit_scores(plan, {"validation": 1} | scalars)
    assert isinstance(answer, Rejected)
    assert says in answer.reason


def test_a_distance_may_exceed_one(plan: Plan) -> None:
    scores = {"validation": 1, "cases.blob": 1, "dice.blob": 1.0, "hd95_mm.blob": 17.5}
    assert isinstance(_admit_scores(plan, scores), Admitted)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda value: value * float("nan"), "not finite"),
        (lambda value: value.double(), "float64"),
        (lambda value: value.flatten()[:1], "agreed is"),
    ],
)
def test_tensors_that_are_not_as_agreed_are_rejected(plan: Plan, damage: Any, says: str) -> None:
    weights = dict(new_specialist(plan).state_dict())
    name = next(iter(weights))
    weights[name] = damage(weights[name])
    arrays = ArrayRecord({each: Array(value.numpy()) for each, value in weights.items()})
    answer = _admit(plan, _records(plan) | {"specialist": arrays})
    assert isinstance(answer, Rejected)
    assert says in answer.reason


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"validation": 2}, "validation is 2, and can be 1 at most"),
        ({"validation": 1, "cases.blob": 2}, "cases.blob is 2, and can be 1 at most"),
        ({"validation": 1, "missing_distances.blob": 9}, "missing_distances.blob is 9, and can be 1 at most"),
    ],
)
def test_scores_of_more_cases_than_the_site_declared_are_rejected(
    plan: Plan, scores: dict[str, float], says: str
) -> None:
    content = {"metrics": MetricRecord(dict(scores)), "site": _records(plan)["site"]}
    reply = Message(RecordDict(content), reply_to=Message(RecordDict(), 7, MessageType.EVALUATE))
    declared = {"labeled": 1.0, "unlabeled": 0.0, "validation": 1.0, "quarantined": 0.0}
    answer = admit(reply, MessageType.EVALUATE, 1, plan, None, {_node(reply): Admitted("alpha", declared, None)})
    assert isinstance(answer, Rejected)
    assert answer.rule == RejectionRule.COUNTS
    assert says in answer.reason


def test_a_reply_from_a_node_that_has_not_joined_is_rejected(plan: Plan) -> None:
    reply = Message(RecordDict(_records(plan)), reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
    answer = admit(reply, MessageType.TRAIN, 1, plan, specialist_spec(plan), {})
    assert isinstance(answer, Rejected)
    assert answer.rule == RejectionRule.ANOTHER_SITE


def _node(reply: Message) -> int:
    return reply.metadata.src_node_id
