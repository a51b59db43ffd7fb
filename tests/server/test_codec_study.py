"""Studies whose plan has a codec: the same weights at every site, fewer bytes both ways, nothing lost by a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import Context, Message, MessageType
from safetensors.torch import load_file
from torch import Tensor

from client.app import app as client_app
from engines.in_process_grid import run_in_process
from semisam_core.codecs import CODECS, leaving_spec
from semisam_core.contract import BASE, SITE_RECORD, SPECIALIST_RECORD, STUDY_RECORD, update_spec
from semisam_core.files import read_json_lines
from semisam_core.packing import packed_spec
from semisam_core.plan import Plan
from server.app import app as server_app
from server.run_folder import RunFolder
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
Weights = dict[str, Tensor]
ROUNDS = 4


@dataclass
class Line:
    """The line between server and sites: what it carried, as (round, site, kind, tensors' names, whether a change)."""

    down: list[tuple[int, str, str, set[str], bool]] = field(default_factory=list)
    up: list[tuple[int, str, str, set[str]]] = field(default_factory=list)
    before: Callable[[int, str, str], None] = lambda number, kind, site: None

    def __call__(self, message: Message, context: Context) -> Message:
        """Carry one message and its reply."""
        kind, site = message.metadata.message_type, Path(str(context.node_config["site-config"])).stem
        study = message.content.config_records[STUDY_RECORD]
        number = int(str(study["round"]))
        self.before(number, kind, site)
        if SPECIALIST_RECORD in message.content:
            names = set(message.content.array_records[SPECIALIST_RECORD])
            self.down.append((number, site, kind, names, BASE in study))
        reply = client_app(message, context)
        if SPECIALIST_RECORD in reply.content:
            assert reply.content.config_records[SITE_RECORD]["site"] == site
            self.up.append((number, site, kind, set(reply.content.array_records[SPECIALIST_RECORD])))
        return reply


def _plan(codec: str, *more: str) -> Plan:
    return tiny_plan(f"training.rounds={ROUNDS}", f"aggregation.codec={codec}", "evaluation.every_rounds=2", *more)


@pytest.fixture
def sites(make_site: MakeSite) -> list[Path]:
    """Two hospitals, one of them without labels."""
    return [make_site("alpha"), make_site("beta", first_seed=10, data={"labeled": []})]


def _run(plan: Plan, sites: list[Path], folder: Path, line: Line | None = None) -> list[dict[str, object]]:
    path = folder.parent / f"{plan.hash[:8]}.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    app = client_app if line is None else line
    run_in_process(server_app, app, [{"site-config": str(site)} for site in sites], config)  # type: ignore[arg-type]
    return read_json_lines(folder / "metrics.jsonl")


def _checkpoint(folder: Path, number: int) -> Weights:
    return load_file(folder / "checkpoints" / f"round-{number:05d}.safetensors")


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _received(site: Path, number: int) -> Weights:
    (path,) = (site.parents[1] / "storage" / site.stem).rglob(f"received-{number:05d}.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", CODECS)
def test_from_the_second_round_on_changes_travel_both_ways_and_all_sites_have_the_servers_weights(
    sites: list[Path], tmp_path: Path, name: str
) -> None:
    plan, line = _plan(f"{{name: {name}}}"), Line()
    _run(plan, sites, tmp_path / "run", line)
    coded, whole = set(packed_spec(leaving_spec(plan))), set(packed_spec(update_spec(plan)))
    trained = [(number, names, change) for number, _, kind, names, change in line.down if kind == MessageType.TRAIN]
    assert [each for each in trained if each[0] == 1] == 2 * [(1, whole, False)]
    assert [each for each in trained if each[0] > 1] == [(n, coded, True) for n in range(2, ROUNDS + 1) for _ in sites]
    scored = [(number, names, change) for number, _, kind, names, change in line.down if kind == MessageType.EVALUATE]
    assert scored == [(n, coded, True) for n in (2, ROUNDS) for _ in sites]
    assert [names for *_, names in line.up] == [coded] * ROUNDS * len(sites)
    for site in sites:
        for number in range(2, ROUNDS + 1):
            assert _same(_received(site, number), _checkpoint(tmp_path / "run", number - 1))


def test_the_server_codes_nothing_if_the_plan_says_so(sites: list[Path], tmp_path: Path) -> None:
    plan, line = _plan("{name: int8, downloads: false}"), Line()
    _run(plan, sites, tmp_path / "run", line)
    assert not any(change for *_, change in line.down)
    assert {frozenset(names) for *_, names in line.up} == {frozenset(packed_spec(leaving_spec(plan)))}
    assert not list(tmp_path.rglob("received-*"))


def test_without_a_codec_nothing_is_a_change_and_nothing_is_kept_for_one(sites: list[Path], tmp_path: Path) -> None:
    line = Line()
    _run(_plan("null"), sites, tmp_path / "run", line)
    assert not any(change for *_, change in line.down)
    assert not [*tmp_path.rglob("received-*"), *tmp_path.rglob("owed-*")]


@pytest.mark.parametrize(("name", "optimizer"), [("float16", "none"), ("int8", "momentum"), ("top-k", "none")])
def test_a_killed_study_resumes_to_the_same_weights(
    sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, optimizer: str
) -> None:
    plan = _plan(f"{{name: {name}}}", f"aggregation.server_optimizer={{name: {optimizer}, learning_rate: 1.0}}")
    _run(plan, sites, tmp_path / "whole")
    original = RunFolder.save_round

    def killed(self: RunFolder, number: int, *rest: object) -> None:
        if number == 3:
            raise KeyboardInterrupt
        original(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "save_round", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(plan, sites, tmp_path / "broken")
    monkeypatch.undo()
    line = Line()
    _run(plan, sites, tmp_path / "broken", line)
    assert [change for number, *_, change in line.down if number == 3] == [False, False]
    assert all(change for number, *_, change in line.down if number > 3)
    for number in (3, ROUNDS):
        assert _same(_checkpoint(tmp_path / "whole", number), _checkpoint(tmp_path / "broken", number))


def test_a_site_that_lost_its_storage_is_sent_the_weights_in_the_same_round(sites: list[Path], tmp_path: Path) -> None:
    lost = False

    def before(number: int, kind: str, site: str) -> None:
        nonlocal lost
        if (number, kind, site) == (3, MessageType.TRAIN, "beta") and not lost:
            lost = True
            for path in (tmp_path / "storage" / "beta").rglob("received-*"):
                path.unlink()

    line = Line(before=before)
    plan = _plan("{name: int8}", "aggregation.minimum_sites=2")
    lines = _run(plan, sites, tmp_path / "run", line)
    assert [each["reason"] for each in lines if each["event"] == "refused"] == ["refused by rule base-not-held"]
    sent = [change for number, site, kind, _, change in line.down if (number, site, kind) == (3, "beta", "train")]
    assert sent == [True, False]
    assert {each["site"] for each in lines if each["event"] == "trained" and each["round"] == 3} == {"alpha", "beta"}


def test_a_site_that_missed_a_round_is_sent_the_weights(sites: list[Path], tmp_path: Path) -> None:
    def before(number: int, kind: str, site: str) -> None:
        if (number, kind, site) == (2, MessageType.TRAIN, "beta"):
            raise RuntimeError("the site is down")

    line = Line(before=before)
    _run(_plan("{name: int8}"), sites, tmp_path / "run", line)
    changes = {(number, site): change for number, site, kind, _, change in line.down if kind == MessageType.TRAIN}
    assert (changes[3, "alpha"], changes[3, "beta"]) == (True, False)
    assert changes[4, "beta"]


def test_a_new_generation_begins_with_weights(sites: list[Path], tmp_path: Path) -> None:
    plan, line = _plan("{name: int8}", "training.generations=2"), Line()
    _run(plan, sites, tmp_path / "run", line)
    changes = [change for number, *_, kind, _, change in line.down if kind == MessageType.TRAIN and number == 3]
    assert changes == [False, False]


@pytest.mark.parametrize(("name", "off"), [("float16", 1e-3), ("int8", 2e-2)])
def test_a_rounds_weights_are_close_to_those_without_a_codec(
    sites: list[Path], tmp_path: Path, name: str, off: float
) -> None:
    # Supervised steps alone: which pseudo-labels pass a gate may hang on a hair.
    more = ("pseudo_labels=null", "regularizer.name=none")
    _run(_plan("null", *more), sites[:1], tmp_path / "plain")
    _run(_plan(f"{{name: {name}}}", *more), sites[:1], tmp_path / "coded")
    start, plain, coded = (_checkpoint(tmp_path / run, n) for run, n in (("plain", 0), ("plain", 1), ("coded", 1)))

    def distance(one: Weights, other: Weights) -> float:
        return sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5

    assert 0 < distance(plain, coded) < off * distance(start, plain)
