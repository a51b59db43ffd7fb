"""Secure studies over real sites in one process: the plain study's weights, from sums alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from scipy import stats

from client.app import app as client_app
from client.site import Site
from engines.in_process_grid import run_in_process
from semisam_core.contract import (
    HEAD_PREFIX,
    MASKED_VECTOR,
    SECURE_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    Stage,
    update_spec,
    weights_sha256,
)
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from semisam_core.secure_aggregation.fixed_point import vector_spec
from server.app import app as server_app
from server.run_folder import RunFolder
from server.study import StudyFailedError
from tests.conftest import tiny_plan, write_blobs, write_site

COMMON = (
    "aggregation.minimum_sites=3",
    "aggregation.weights=equal",
    "aggregation.admission={norm_factor: null}",
    "aggregation.wait_for_quorum_s=5",
)
SECURE = (*COMMON, "aggregation.secure={stage_deadline_s: 60}")
NAMES = ("alpha", "beta", "gamma")
STAGES = [stage.value for stage in Stage]
FEATURE_HEAD = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources={feature_head: {generalist: fake, reduced_channels: 4, hidden_channels: 4, batch: 2, "
    "steps_per_round: 2}}",
)


class _Wire:
    """The sites, and every reply that the server was sent."""

    def __init__(self) -> None:
        self.app = ClientApp()
        self.replies: list[tuple[str, str, Message]] = []
        for register, kinds in (
            (self.app.query, ["query"]),
            (self.app.train, ["train", *STAGES]),
            (self.app.evaluate, ["evaluate"]),
        ):
            for kind in kinds:
                register(kind.partition(".")[2] or "default")(self._pass)

    def _pass(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        site = str(reply.content.config_records[SITE_RECORD]["site"])
        self.replies.append((message.metadata.message_type, site, reply))
        return reply

    def of(self, kind: str) -> list[tuple[str, Message]]:
        return [(site, reply) for sent, site, reply in self.replies if sent == kind]


def _hospitals(folder: Path) -> list[Path]:
    """Write three hospitals with one labeled scan each."""
    for k, name in enumerate(NAMES):
        write_blobs(folder / "data" / name, 3, 10 * k)
    return [write_site(folder, name) for name in NAMES]


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    return _hospitals(tmp_path)


@dataclass(frozen=True)
class _Whole:
    """A secure study from start to end, its sites' audit logs, and what the server was sent."""

    plan: Plan
    folder: Path
    sites: list[Path]
    wire: _Wire
    audit: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> _Whole:
    torch.set_num_threads(1)
    folder, plan, wire = tmp_path_factory.mktemp("whole"), tiny_plan(*SECURE), _Wire()
    sites = _hospitals(folder)
    _run(plan, sites, folder / "run", wire.app)
    audit = {name: read_json_lines(folder / "storage" / name / "audit.jsonl") for name in NAMES}
    return _Whole(plan, folder, sites, wire, audit)


def _run(plan: Plan, sites: list[Path], folder: Path, app: ClientApp = client_app) -> RunFolder:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, app, [{"site-config": str(site)} for site in sites], config)
    return RunFolder(folder)


def _weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"round-{number:05d}.safetensors")


def _compare(plain: Path, secure: Path, rounds: int) -> None:
    """Compare two runs: after one round they differ by the last bit, of which Adam makes more in later rounds."""
    for number in range(1, rounds + 1):
        one, other = _weights(plain, number), _weights(secure, number)
        assert one.keys() == other.keys()
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < (2e-7 if number == 1 else 1e-3)
    dice = [[line["dice.blob"] for line in RunFolder(folder).records("evaluated")] for folder in (plain, secure)]
    assert np.abs(np.subtract(*dice)).max() < 0.005


def test_a_secure_study_gives_the_plain_studys_weights(whole: _Whole, tmp_path: Path) -> None:
    _run(tiny_plan(*COMMON), whole.sites, tmp_path / "plain")
    _compare(tmp_path / "plain", whole.folder / "run", 2)


def test_a_feature_head_is_in_the_same_sum_with_the_weight_of_its_labels(sites: list[Path], tmp_path: Path) -> None:
    more = (*FEATURE_HEAD, "training.rounds=1")
    _run(tiny_plan(*COMMON, *more), sites, tmp_path / "plain")
    record = _run(tiny_plan(*SECURE, *more), sites, tmp_path / "secure")
    assert any(name.startswith(HEAD_PREFIX) for name in _weights(tmp_path / "secure", 1))
    _compare(tmp_path / "plain", tmp_path / "secure", 1)
    assert record.records("aggregated")[0]["head_weight"] == 12


def test_nothing_that_leaves_a_site_holds_its_update(whole: _Whole) -> None:
    assert {tuple(reply.content) for _, reply in whole.wire.of("train")} == {("metrics", "site")}
    masked = whole.wire.of("train.masked")
    assert sorted(site for site, _ in masked) == sorted(2 * NAMES)
    records = [reply.content.array_records[SPECIALIST_RECORD] for _, reply in masked]
    assert {tuple(record) for record in records} == {(MASKED_VECTOR,)}
    seen = np.concatenate([record[MASKED_VECTOR].numpy().view(np.uint8) for record in records])
    assert stats.chisquare(np.bincount(seen, minlength=256)).pvalue > 1e-6
    for stage in (Stage.KEYS, Stage.SHARES, Stage.UNMASK):
        for _, reply in whole.wire.of(stage.value):
            assert set(reply.content) == {"metrics", "site", SECURE_RECORD}
            assert dict(reply.content["metrics"]) == {}


def test_each_stage_is_in_the_audit_log_with_bytes_and_hash(whole: _Whole) -> None:
    size = vector_spec(update_spec(whole.plan)).shape[0]
    digests = []
    for name in NAMES:
        lines = [line for line in whole.audit[name] if line["round"] == 1]
        kinds = [line["kind"] for line in lines]
        assert kinds == ["train", "train.keys", "secure-keys", *STAGES[1:], "evaluate"]
        booked = dict(zip(kinds, lines, strict=True))
        assert "bytes" not in booked["train"]
        reply = next(reply for site, reply in whole.wire.of("train.masked") if site == name)
        vector = torch.from_numpy(reply.content.array_records[SPECIALIST_RECORD][MASKED_VECTOR].numpy().copy())
        assert booked["train.masked"]["bytes"] == 8 * size
        assert booked["train.masked"]["sha256"] == weights_sha256({MASKED_VECTOR: vector})
        shares = next(reply for site, reply in whole.wire.of("train.shares") if site == name)
        sent = {key: len(value) for key, value in shares.content.config_records[SECURE_RECORD].items()}
        assert booked["train.shares"]["material"] == sent
        assert set(sent) == {f"sealed-for.{other}" for other in NAMES if other != name}
        digests.append([line["keys_sha256"] for line in whole.audit[name] if line["kind"] == "secure-keys"])
        assert booked["secure-keys"]["sites"] == list(NAMES)
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0])) == 2  # fresh keys in each round


def test_no_secret_outlives_its_round(whole: _Whole) -> None:
    assert not list((whole.folder / "storage").rglob("secure"))
    assert len(list((whole.folder / "storage").rglob("released.jsonl"))) == 3


def test_a_killed_secure_study_resumes_to_the_same_weights(
    whole: _Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunFolder.save_round

    def killed(self: RunFolder, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        original(self, number, *rest)

    monkeypatch.setattr(RunFolder, "save_round", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(whole.plan, whole.sites, tmp_path / "broken")
    monkeypatch.undo()
    _run(whole.plan, whole.sites, tmp_path / "broken")
    one, other = _weights(whole.folder / "run", 2), _weights(tmp_path / "broken", 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_site_whose_update_is_too_large_refuses_by_a_word_and_keeps_nothing(
    sites: list[Path], tmp_path: Path
) -> None:
    plan = tiny_plan(*COMMON, "aggregation.secure={maximum_norm: 1e-6}")
    with pytest.raises(StudyFailedError, match="alpha: refused by rule update-too-large"):
        _run(plan, sites, tmp_path / "run")
    assert not list((tmp_path / "storage").rglob("secure"))
    (line,) = [x for x in read_json_lines(tmp_path / "storage" / "alpha" / "audit.jsonl") if x["kind"] == "train"]
    assert "maximum_norm" in line["reason_kept_here"]


def test_an_update_that_is_not_finite_is_refused_at_the_site(
    sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked, it would be a finite number like any other."""
    original = Site.train

    def spoiled(self: Site, weights: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if self.config.site == "beta":
                patch.setattr("client.site._cpu", lambda state: {k: v * float("nan") for k, v in state.items()})
            return original(self, weights)

    monkeypatch.setattr(Site, "train", spoiled)
    with pytest.raises(StudyFailedError, match="beta: refused by rule training-diverged"):
        _run(tiny_plan(*SECURE), sites, tmp_path / "run")


def test_without_a_secure_plan_a_site_takes_no_part_in_a_sum(sites: list[Path], tmp_path: Path) -> None:
    plan, secure = tiny_plan(*COMMON, "training.rounds=1"), tiny_plan(*SECURE, "training.rounds=1")
    wire = _Wire()

    def lie(message: Message, context: Context) -> Message:
        """Let the server believe in a secure plan, and the sites in a plain one."""
        study = message.content.config_records["study"]
        study["plan"], study["plan-hash"] = plan.canonical_json(), plan.hash
        reply = client_app(message, context)
        about = reply.content.config_records[SITE_RECORD]
        about["plan-hash"] = secure.hash
        wire.replies.append((message.metadata.message_type, str(about["site"]), reply))
        reply.content.array_records.pop(SPECIALIST_RECORD, None)
        reply.content.pop(SPECIALIST_RECORD, None)
        return reply

    app = ClientApp()
    app.query()(lie)
    app.train()(lie)
    app.train("keys")(lie)
    with pytest.raises(StudyFailedError, match="alpha: refused by rule secure-aggregation"):
        _run(secure, sites, tmp_path / "run", app)
    assert wire.of("train.keys")
