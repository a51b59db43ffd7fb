"""The ClientApp: how it handles messages, and that only agreed content leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import semisam_core
from client.app import app
from client.manifest import manifest_of
from client.site import Site
from client.site_config import load_site_config
from semisam_core.codecs import CODECS, leaving_spec
from semisam_core.contract import BASE, SPECIALIST_RECORD, STUDY_RECORD, RefusalRule, RejectionRule, weights_sha256
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.packing import packed_spec
from semisam_core.plan import Plan
from tests.conftest import tiny_plan, write_nifti
from tests.server.replies import arrays

MakeSite = Callable[..., Path]
CANARY = "jane-doe-19640203"


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0


def _message(plan: Plan, kind: str, number: int, /, weights: bool = True, **study: Any) -> Message:
    fields = {"plan": plan.canonical_json(), "plan-hash": plan.hash, "run": "run", "round": number, "final": False}
    fields["code-version"] = semisam_core.__version__
    content = RecordDict({STUDY_RECORD: ConfigRecord(fields | study)})
    if weights:
        state = new_specialist(plan).state_dict()
        content[SPECIALIST_RECORD] = arrays(state)
    return Message(content, 1, kind)


def _context(node_config: dict[str, Any], **run_config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config=run_config)


def _send(path: Path, message: Message) -> Message:
    return app(message, _context({"site-config": str(path)}))


def _rule(reply: Message) -> str:
    return str(reply.content.config_records["refusal"]["rule"])


def _everything(reply: Message) -> bytes:
    """Return every byte of a reply: names, texts, numbers, arrays, error."""
    parts = [repr(reply.error) if reply.has_error() else ""]
    arrays = b""
    if not reply.has_error():
        for name, record in reply.content.items():
            parts.append(name)
            for key, value in record.items():
                parts.append(key)
                if isinstance(value, Array):
                    arrays += value.data
                else:
                    parts.append(repr(value))
    return " ".join(parts).encode() + arrays


def test_join_train_and_evaluate_reply_with_agreed_records_only(make_site: MakeSite, plan: Plan) -> None:
    path = make_site()
    join = _send(path, _message(plan, MessageType.QUERY, 0, weights=False))
    train = _send(path, _message(plan, MessageType.TRAIN, 1))
    evaluate = _send(path, _message(plan, MessageType.EVALUATE, 1))
    assert set(join.content) == {"metrics", "site"}
    assert set(train.content) == {"metrics", "site", "specialist"}
    assert set(evaluate.content) == {"metrics", "site"}
    about = {"site": "alpha", "plan-hash": plan.hash}
    split = join.content.config_records["site"]["split-hash"]
    for number, reply, more in ((0, join, {"counts": "exact"}), (1, train, {}), (1, evaluate, {})):
        assert dict(reply.content.config_records["site"]) == about | {"round": number, "split-hash": split} | more


def test_every_reply_is_in_the_audit_log(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    path = make_site()
    _send(path, _message(plan, MessageType.QUERY, 0, weights=False))
    _send(path, _message(plan, MessageType.TRAIN, 1))
    _send(path, _message(plan, MessageType.TRAIN, 1, run="../escape"))
    lines = read_json_lines(tmp_path / "storage" / "alpha" / "audit.jsonl")
    assert [line["kind"] for line in lines] == ["join", "train", "train"]
    assert "sha256" in lines[1]
    assert lines[2]["refused"] == "run-name"


@pytest.mark.parametrize(
    ("study", "rule"),
    [
        ({"plan": "{}"}, RefusalRule.PLAN_INVALID),
        ({"plan": "not json"}, RefusalRule.PLAN_INVALID),
        ({"plan-hash": "0" * 64}, RefusalRule.PLAN_HASH),
        ({"code-version": "0.0.9"}, RefusalRule.VERSION),
        ({"code-version": 1}, RefusalRule.VERSION),
        ({"run": "../../etc"}, RefusalRule.RUN_NAME),
        ({"run": 7}, RefusalRule.RUN_NAME),
        ({"round": -1}, RefusalRule.PLAN_INVALID),
        ({"round": 99}, RefusalRule.PLAN_INVALID),
        ({"round": True}, RefusalRule.PLAN_INVALID),
    ],
)
def test_an_invalid_message_is_refused_by_rule(
    make_site: MakeSite, plan: Plan, study: dict[str, Any], rule: RefusalRule
) -> None:
    assert _rule(_send(make_site(), _message(plan, MessageType.TRAIN, 1, **study))) == rule.value


def test_a_deployed_site_answers_under_the_approved_manifest_only(make_site: MakeSite, plan: Plan) -> None:
    path = make_site()
    approved = manifest_of(load_site_config(path), plan).hash
    context = _context({"site-config": str(path), "approved-manifest": approved})
    assert "metrics" in app(_message(plan, MessageType.QUERY, 0, weights=False), context).content
    for other in (tiny_plan("training.rounds=3"), tiny_plan("specialist.arguments.channels=[4, 16]")):
        reply = app(_message(other, MessageType.TRAIN, 1), context)
        assert _rule(reply) == "manifest-not-approved"
    assert "specialist" in app(_message(tiny_plan("seed=4"), MessageType.TRAIN, 1), context).content
    none = _context({"site-config": str(path), "approved-manifest": ""})
    assert _rule(app(_message(plan, MessageType.QUERY, 0, weights=False), none)) == "manifest-not-approved"


def test_a_message_without_a_study_or_without_weights_is_refused(make_site: MakeSite, plan: Plan) -> None:
    path = make_site()
    assert _rule(_send(path, Message(RecordDict(), 1, MessageType.TRAIN))) == "plan-invalid"
    assert _rule(_send(path, _message(plan, MessageType.TRAIN, 1, weights=False))) == "internal-error"


def test_weights_of_another_network_are_refused(make_site: MakeSite, plan: Plan) -> None:
    message = _message(plan, MessageType.TRAIN, 1)
    message.content[SPECIALIST_RECORD] = ArrayRecord({"foreign": Array(np.zeros(3, np.float32))})
    assert _rule(_send(make_site(), message)) == "weights-not-as-agreed"


def _coded(plan: Plan, number: int, base: str, **vectors: Any) -> Message:
    """Return a message of changes, all zero but for `vectors`."""
    message = _message(plan, MessageType.TRAIN, number, **{BASE: base})
    zeros = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in packed_spec(leaving_spec(plan)).items()}
    arrays_of = {name: Array(each.numpy()) for name, each in (zeros | vectors).items()}
    message.content[SPECIALIST_RECORD] = ArrayRecord(arrays_of)
    return message


def test_a_change_is_taken_only_of_weights_that_are_held_and_only_if_the_plan_has_a_codec(
    make_site: MakeSite, plan: Plan
) -> None:
    path, coded = make_site(), tiny_plan("aggregation.codec={name: top-k}")
    assert _rule(_send(path, _coded(coded, 1, "0" * 64))) == "base-not-held"
    assert _rule(_send(path, _message(plan, MessageType.TRAIN, 1, **{BASE: "0" * 64}))) == "weights-not-as-agreed"
    assert SPECIALIST_RECORD in _send(path, _message(coded, MessageType.TRAIN, 1)).content
    assert _rule(_send(path, _coded(coded, 2, "0" * 64))) == "base-not-held"
    base = weights_sha256(dict(new_specialist(coded).state_dict()))
    # All positions of a change of zeros are zero, which no server sends.
    assert _rule(_send(path, _coded(coded, 2, base))) == "weights-not-as-agreed"
    positions = torch.arange(packed_spec(leaving_spec(coded))["int32"].shape[0], dtype=torch.int32)
    assert SPECIALIST_RECORD in _send(path, _coded(coded, 2, base, int32=positions)).content
    assert _rule(_send(path, _message(coded, MessageType.TRAIN, 2, **{BASE: base}))) == "weights-not-as-agreed"


@pytest.mark.parametrize("name", CODECS)
def test_a_coded_round_that_is_asked_for_again_sends_the_same_again(make_site: MakeSite, name: str) -> None:
    path, plan = make_site(), tiny_plan(f"aggregation.codec={{name: {name}}}")

    def sent(number: int) -> list[bytes]:
        reply = _send(path, _message(plan, MessageType.TRAIN, number))
        return [array.data for array in reply.content.array_records[SPECIALIST_RECORD].values()]

    first, second = sent(1), sent(2)
    assert sent(2) == second
    assert sent(1) == first
    for kept in path.parents[1].rglob("owed-*"):
        kept.unlink()
    assert sent(2) != second
    assert sent(1) == first
    assert sent(2) == second


def test_a_site_owes_nothing_to_a_new_generation(make_site: MakeSite) -> None:
    more = ("training.rounds=4", "training.generations=2", "pseudo_labels=null", "regularizer.name=none")
    path, plan = make_site(), tiny_plan("aggregation.codec={name: top-k}", *more)

    def sent(number: int) -> list[bytes]:
        reply = _send(path, _message(plan, MessageType.TRAIN, number))
        return [array.data for array in reply.content.array_records[SPECIALIST_RECORD].values()]

    third = sent(3)
    sent(1), sent(2)
    assert sent(3) == third


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"data": {"labeled": [], "validation": []}, "generalists": {}}, RefusalRule.NOTHING_TO_LEARN),
        ({"generalists": {"lite-medsam": {"weights": "packaged", "sha256": "a" * 64}}}, RefusalRule.GENERALIST),
        ({"egress": {"maximum_update_mb": 1e-3}}, RefusalRule.EGRESS),
    ],
)
def test_a_site_that_cannot_do_the_work_refuses_by_the_rule_of_the_cause(
    make_site: MakeSite, changes: dict[str, Any], rule: RefusalRule
) -> None:
    name = next(iter(changes.get("generalists", {})), "fake")
    plan = tiny_plan(f"pseudo_labels.generalists=[{name}]")
    reply = _send(make_site(**changes), _message(plan, MessageType.TRAIN, 1))
    assert _rule(reply) == rule.value


def test_a_site_whose_cases_are_all_quarantined_refuses_to_join(
    make_site: MakeSite, tmp_path: Path, plan: Plan
) -> None:
    path = make_site()
    for image in (tmp_path / "data" / "alpha" / "images").iterdir():
        image.write_bytes(b"no image")
    assert _rule(_send(path, _message(plan, MessageType.QUERY, 0, weights=False))) == RefusalRule.NO_USABLE_CASE.value


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (RuntimeError(f"while reading /data/{CANARY}.nii.gz"), "internal-error"),
        (FloatingPointError(CANARY), "training-diverged"),
        (OSError(28, CANARY), "storage"),
        (MemoryError(CANARY), "internal-error"),
    ],
)
def test_no_text_of_an_exception_leaves(
    make_site: MakeSite, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, error: Exception, rule: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Site, "train", fail)
    reply = _send(make_site(), _message(plan, MessageType.TRAIN, 1))
    assert _rule(reply) == rule
    assert CANARY.encode() not in _everything(reply)
    assert CANARY in (tmp_path / "storage" / "alpha" / "audit.jsonl").read_text()


def test_a_site_that_cannot_write_its_audit_log_sends_nothing_not_even_a_path(
    make_site: MakeSite, tmp_path: Path, plan: Plan
) -> None:
    path = make_site()
    (tmp_path / "storage" / "alpha" / "audit.jsonl").mkdir(parents=True)
    reply = _send(path, _message(plan, MessageType.TRAIN, 1))
    assert reply.has_error()
    assert reply.error.reason == "audit-log"
    assert str(tmp_path).encode() not in _everything(reply)


def test_no_name_path_or_voxel_of_any_case_leaves(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    path = make_site(data={"labeled": [f"{CANARY}-0"], "validation": [f"{CANARY}-2"]})
    data = tmp_path / "data" / "alpha"
    for file in [*data.glob("*/case-*")]:
        file.rename(file.with_name(file.name.replace("case", CANARY)))
    write_nifti(data / "images" / f"{CANARY}-bad.nii.gz", np.full((24, 24, 16), np.nan, np.float32))
    replies = [
        _send(path, _message(plan, MessageType.QUERY, 0, weights=False)),
        _send(path, _message(plan, MessageType.TRAIN, 1)),
        _send(path, _message(plan, MessageType.EVALUATE, 1, final=True)),
    ]
    assert CANARY in (tmp_path / "storage" / "alpha" / "runs" / "run" / "quarantine.json").read_text()
    for reply in replies:
        sent = _everything(reply)
        assert CANARY.encode() not in sent
        assert str(tmp_path).encode() not in sent
        assert b".nii" not in sent
        assert len(sent) < 60_000  # the specialist has 10 kB; a single scan would be 37 kB more


def test_a_deployed_site_ignores_the_run_configs_sites(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    own, foreign = make_site("alpha"), make_site("beta", first_seed=5)
    context = _context({"site-config": str(own), "partition-id": 1}, sites=str(foreign.parent))
    reply = app(_message(plan, MessageType.QUERY, 0, weights=False), context)
    assert reply.content.config_records["site"]["site"] == "alpha"


def test_a_simulated_site_is_picked_by_its_partition(make_site: MakeSite, plan: Plan) -> None:
    make_site("alpha")
    folder = make_site("beta", first_seed=5).parent
    names = []
    for number in (0, 1):
        context = _context({"partition-id": number, "num-partitions": 2}, sites=str(folder))
        reply = app(_message(plan, MessageType.QUERY, 0, weights=False), context)
        names.append(reply.content.config_records["site"]["site"])
    assert names == ["alpha", "beta"]


def test_a_site_without_a_usable_config_replies_with_the_rule_alone(tmp_path: Path, plan: Plan) -> None:
    for node_config in ({}, {"site-config": str(tmp_path / "absent.yaml")}, {"partition-id": 3}):
        reply = app(_message(plan, MessageType.QUERY, 0, weights=False), _context(dict(node_config)))
        assert reply.error.reason == "site-config"
        assert str(tmp_path).encode() not in _everything(reply)


def test_the_audit_log_of_a_reply_names_no_case(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    _send(make_site(), _message(plan, MessageType.TRAIN, 1))
    (line,) = (tmp_path / "storage" / "alpha" / "audit.jsonl").read_text().splitlines()
    assert "case-" not in line
    assert json.loads(line)["plan"] == plan.hash


@pytest.mark.parametrize("rule", list(RejectionRule))
def test_a_rejection_by_the_server_is_logged_and_audited_and_the_site_continues(
    make_site: MakeSite, tmp_path: Path, plan: Plan, rule: RejectionRule, caplog: pytest.LogCaptureFixture
) -> None:
    notice = {"rejected": rule.value, "rejected-round": 3}
    reply = _send(make_site(), _message(plan, MessageType.QUERY, 0, weights=False, **notice))
    assert "metrics" in reply.content
    assert f"rejected this site's update of round 3 by rule {rule.value}" in caplog.text
    lines = read_json_lines(tmp_path / "storage" / "alpha" / "audit.jsonl")
    assert [line["kind"] for line in lines] == ["rejected", "join"]
    assert (lines[0]["rejected_by_the_server"], lines[0]["round"]) == (rule.value, 3)


@pytest.mark.parametrize(
    ("notice", "audited"),
    [
        ({"rejected": "<script>alert(1)</script>", "rejected-round": 1}, ("unknown", 1)),
        ({"rejected": ["too-large"], "rejected-round": 1}, ("unknown", 1)),
        ({"rejected": 7, "rejected-round": "one"}, ("unknown", -1)),
        ({"rejected": "too-large"}, ("too-large", -1)),
    ],
)
def test_an_unknown_rejection_rule_is_audited_as_unknown(
    make_site: MakeSite, tmp_path: Path, plan: Plan, notice: dict[str, Any], audited: tuple[str, int]
) -> None:
    _send(make_site(), _message(plan, MessageType.QUERY, 0, weights=False, **notice))
    line = read_json_lines(tmp_path / "storage" / "alpha" / "audit.jsonl")[0]
    assert (line["rejected_by_the_server"], line["round"]) == audited
    assert "script" not in (tmp_path / "storage" / "alpha" / "audit.jsonl").read_text()


def test_without_a_rejection_none_is_audited(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    _send(make_site(), _message(plan, MessageType.QUERY, 0, weights=False))
    assert [line["kind"] for line in read_json_lines(tmp_path / "storage" / "alpha" / "audit.jsonl")] == ["join"]
