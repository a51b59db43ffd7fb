"""Which replies are admitted, and why one is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from semisam_core.codecs import CHANGE, encode_update, leaving_spec, nothing_owed
from semisam_core.contract import RefusalRule, RejectionRule, specialist_spec
from semisam_core.inference import new_specialist
from semisam_core.packing import pack
from semisam_core.plan import Plan
from server.admission import Admitted, Failed, NotAdmitted, Refused, Rejected, admit
from server.arrays import update_reader, vector_reader
from tests.conftest import tiny_plan
from tests.server.replies import SCALARS as REPLY
from tests.server.replies import answer, arrays, initial, trained

SCALARS = {"labeled": 1, "unlabeled": 2, "accepted": 0, "confidence": 0.5, "steps": 2, "loss.supervised": -0.5}


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0


def _records(plan: Plan) -> dict[str, Any]:
    weights = new_specialist(plan).state_dict()
    return {
        "metrics": MetricRecord(dict(SCALARS)),
        "site": ConfigRecord({"site": "alpha", "round": 1, "plan-hash": plan.hash}),
        "specialist": arrays(weights),
    }


def _admit(plan: Plan, content: dict[str, Any] | Error) -> Admitted | NotAdmitted:
    asked = Message(RecordDict(), 7, MessageType.TRAIN)
    reply = Message(content if isinstance(content, Error) else RecordDict(content), reply_to=asked)
    return admit(reply, MessageType.TRAIN, 1, plan, vector_reader(specialist_spec(plan)))


def _admit_scores(plan: Plan, scores: dict[str, float]) -> Admitted | NotAdmitted:
    content = {"metrics": MetricRecord(dict(scores)), "site": _records(plan)["site"]}
    reply = Message(RecordDict(content), reply_to=Message(RecordDict(), 7, MessageType.EVALUATE))
    return admit(reply, MessageType.EVALUATE, 1, plan, None)


def test_a_valid_reply_is_admitted_unchanged(plan: Plan) -> None:
    answer = _admit(plan, _records(plan))
    assert isinstance(answer, Admitted)
    assert answer.site == "alpha"
    assert answer.scalars == SCALARS
    assert answer.weights is not None
    expected = new_specialist(plan).state_dict()
    assert all(torch.equal(answer.weights[name], expected[name]) for name in expected)


def test_an_error_reply_is_a_failure_and_its_text_is_dropped(plan: Plan) -> None:
    answer = _admit(plan, Error(ErrorCode.CLIENT_APP_CRASHED, "secret text"))
    assert isinstance(answer, Failed)
    assert answer.reason == f"its ClientApp was killed (Flower's error code {ErrorCode.CLIENT_APP_CRASHED})"
    assert answer.retryable


def test_a_site_that_cannot_send_records_refuses_by_an_error_with_the_word(plan: Plan) -> None:
    answer = _admit(plan, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "audit-log"))
    assert isinstance(answer, Refused)
    assert answer.rule == RefusalRule.AUDIT_LOG
    assert answer.reason == "refused by rule audit-log"


@pytest.mark.parametrize(("word", "rule"), [("storage", RefusalRule.STORAGE), ("<script>", None), (3, None)])
def test_a_refusal_is_taken_by_its_word_only(plan: Plan, word: str | int, rule: RefusalRule | None) -> None:
    answer = _admit(plan, _records(plan) | {"refusal": ConfigRecord({"rule": word})})
    assert answer == Refused("alpha", rule)
    assert isinstance(answer, Refused)
    assert answer.reason == f"refused by rule {rule.value if rule is not None else 'unknown'}"


TRANSIENT = {"storage", "internal-error", "audit-log", "process-ended", "out-of-time", "base-not-held"}


@pytest.mark.parametrize("rule", RefusalRule)
def test_only_refusals_that_may_pass_are_worth_asking_again(plan: Plan, rule: RefusalRule) -> None:
    answer = _admit(plan, _records(plan) | {"refusal": ConfigRecord({"rule": rule.value})})
    assert isinstance(answer, Refused)
    assert answer.retryable == (rule.value in TRANSIENT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"site": None}, "names no site"),
        ({"site": ConfigRecord({"site": "../x", "round": 1})}, "names no site"),
        ({"site": ConfigRecord({"site": "alpha", "round": 2, "plan-hash": "?"})}, "another round or plan"),
        ({"metrics": None}, "no scalars"),
        ({"metrics": MetricRecord(SCALARS | {"patients": 3})}, "not on the agreed list"),
        ({"metrics": MetricRecord({"labeled": 1})}, "are missing"),
        ({"metrics": MetricRecord(SCALARS | {"seconds": float("nan")})}, "seconds is not a finite number"),
        ({"metrics": MetricRecord(SCALARS | {"labeled": [1, 2]})}, "labeled is not a finite number"),
        ({"metrics": MetricRecord(SCALARS | {"labeled": -1})}, "labeled is negative"),
        ({"metrics": MetricRecord(SCALARS | {"accepted": 1.5})}, "accepted is a count but not a whole number"),
        ({"metrics": MetricRecord(SCALARS | {"labeled": 1e300})}, "labeled is a count but not a whole number"),
        ({"metrics": MetricRecord(SCALARS | {"gated.empty": 0.5})}, "gated.empty is a count but not a whole number"),
        ({"metrics": MetricRecord(SCALARS | {"confidence": 1.01})}, "confidence is a share but exceeds 1"),
        ({"metrics": MetricRecord(SCALARS | {"confidence": -0.01})}, "confidence is negative"),
        ({"metrics": MetricRecord(SCALARS | {"confidence": float("nan")})}, "confidence is not a finite number"),
        ({"specialist": None}, "no specialist"),
        ({"specialist": ArrayRecord({"x": Array(torch.ones(2).numpy())})}, "agreed tensors are missing"),
    ],
)
def test_a_reply_that_breaks_the_contract_is_rejected_with_the_reason(
    plan: Plan, change: dict[str, Any], says: str
) -> None:
    records = {name: record for name, record in (_records(plan) | change).items() if record is not None}
    answer = _admit(plan, records)
    assert isinstance(answer, Rejected)
    assert says in answer.reason
    assert not answer.retryable


@pytest.mark.parametrize("confidence", [0, 0.0, 1, 1.0])
def test_a_confidence_at_either_end_is_admitted(plan: Plan, confidence: float) -> None:
    answer = _admit(plan, _records(plan) | {"metrics": MetricRecord(SCALARS | {"confidence": confidence})})
    assert isinstance(answer, Admitted)
    assert answer.scalars["confidence"] == confidence


@pytest.mark.parametrize(
    ("scalars", "says"),
    [
        ({"dice.blob": 1.5}, "dice.blob is a share but exceeds 1"),
        ({"surface_dice.blob": 100.0}, "surface_dice.blob is a share but exceeds 1"),
        ({"cases.blob": 0.5}, "cases.blob is a count but not a whole number"),
        ({"hd95_mm.blob": -1.0}, "hd95_mm.blob is negative"),
    ],
)
def test_an_impossible_score_is_rejected(plan: Plan, scalars: dict[str, float], says: str) -> None:
    answer = _admit_scores(plan, {"validation": 1} | scalars)
    assert isinstance(answer, Rejected)
    assert says in answer.reason


def test_a_distance_may_exceed_one(plan: Plan) -> None:
    scores = {"validation": 1, "cases.blob": 1, "dice.blob": 1.0, "hd95_mm.blob": 17.5}
    assert isinstance(_admit_scores(plan, scores), Admitted)


@pytest.mark.parametrize(
    ("codec", "vector", "value", "rule"),
    [
        ("top-k", "int32", 7, RejectionRule.TENSORS),  # every position the same
        ("int8", "float32", float("nan"), RejectionRule.NOT_FINITE),
        ("int8", "float32", 3e38, RejectionRule.NOT_FINITE),  # finite, but no longer so times 127
        ("float16", CHANGE, float("inf"), RejectionRule.NOT_FINITE),
    ],
)
def test_coded_tensors_that_no_site_sends_are_rejected(
    codec: str, vector: str, value: float, rule: RejectionRule
) -> None:
    plan = tiny_plan(f"aggregation.codec={{name: {codec}}}")
    start = initial(plan)
    coded, _ = encode_update(trained(plan), start, nothing_owed(plan), plan)
    honest = pack(coded, leaving_spec(plan))
    for vectors, admitted in ((honest, True), (honest | {vector: torch.full_like(honest[vector], value)}, False)):
        record = ArrayRecord({name: Array(each.numpy()) for name, each in vectors.items()})
        reply = Message(
            RecordDict(_records(plan) | {"specialist": record}),
            reply_to=Message(RecordDict(), 7, MessageType.TRAIN),
        )
        answer = admit(reply, MessageType.TRAIN, 1, plan, update_reader(plan, start))
        assert isinstance(answer, Admitted) is admitted
        if isinstance(answer, Rejected):
            assert answer.rule is rule


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda value: value * float("nan"), "not finite"),
        (lambda value: value.double(), "float64"),
        (lambda value: value.flatten()[:1], "expected"),
    ],
)
def test_tensors_that_break_the_contract_are_rejected(plan: Plan, damage: Any, says: str) -> None:
    (vector,) = _records(plan)["specialist"].values()
    damaged = ArrayRecord({"float32": Array(damage(torch.from_numpy(vector.numpy().copy())).numpy())})
    answer = _admit(plan, _records(plan) | {"specialist": damaged})
    assert isinstance(answer, Rejected)
    assert says in answer.reason


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"validation": 2}, "validation is 2 but can be at most 1"),
        ({"validation": 1, "cases.blob": 2}, "cases.blob is 2 but can be at most 1"),
        ({"validation": 1, "missing_distances.blob": 9}, "missing_distances.blob is 9 but can be at most 1"),
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


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "admitted"),
    [(1, 2, True), (2, 1, True), (3, 0, True), (0, 3, True), (2, 2, False), (4, 0, False), (0, 4, False)],
)
def test_scans_may_become_labeled_but_not_more(plan: Plan, labeled: int, unlabeled: int, admitted: bool) -> None:
    scalars = SCALARS | {"labeled": labeled, "unlabeled": unlabeled}
    reply = Message(
        RecordDict(_records(plan) | {"metrics": MetricRecord(scalars)}),
        reply_to=Message(RecordDict(), 7, MessageType.TRAIN),
    )
    declared = {"labeled": 1.0, "unlabeled": 2.0, "validation": 1.0, "quarantined": 0.0}
    read, joined = vector_reader(specialist_spec(plan)), {_node(reply): Admitted("alpha", declared, None)}
    answer = admit(reply, MessageType.TRAIN, 1, plan, read, joined)
    assert isinstance(answer, Admitted) is admitted
    if isinstance(answer, Rejected):
        assert (answer.rule, "labeled + unlabeled is 4" in answer.reason) == (RejectionRule.COUNTS, True)


def test_a_reply_from_a_node_that_has_not_joined_is_rejected(plan: Plan) -> None:
    reply = Message(RecordDict(_records(plan)), reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
    answer = admit(reply, MessageType.TRAIN, 1, plan, vector_reader(specialist_spec(plan)), {})
    assert isinstance(answer, Rejected)
    assert answer.rule == RejectionRule.ANOTHER_SITE


def _node(reply: Message) -> int:
    return reply.metadata.src_node_id


@pytest.mark.parametrize(
    ("joined", "split", "rule"),
    [
        ("a" * 64, "a" * 64, None),
        (None, None, None),
        ("a" * 64, "b" * 64, RejectionRule.SPLIT_CHANGED),
        ("a" * 64, None, RejectionRule.SPLIT_CHANGED),
        (None, "a" * 64, RejectionRule.SPLIT_CHANGED),
        ("a" * 64, "jane-doe", RejectionRule.RECORDS),
        ("a" * 64, 7, RejectionRule.RECORDS),
    ],
)
def test_a_sites_split_must_be_the_one_that_it_joined_with(
    plan: Plan, joined: str | None, split: Any, rule: RejectionRule | None
) -> None:
    about = {"site": "alpha", "round": 1, "plan-hash": plan.hash} | ({} if split is None else {"split-hash": split})
    records = _records(plan) | {"site": ConfigRecord(about), "metrics": MetricRecord(dict(REPLY))}
    found = answer(plan, records, split=joined)
    assert (found.rule if isinstance(found, Rejected) else None) == rule
