"""Secure sums over sites that really mask: lost sites, hostile ones, and a server that is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord
from torch import Tensor

from semisam_core.contract import (
    HEAD,
    KEY_SHARE,
    MASK_KEY,
    MASKED_VECTOR,
    METRICS_RECORD,
    SECURE_RECORD,
    SEED_SHARE,
    SPECIALIST_RECORD,
    Stage,
)
from semisam_core.files import append_json_line
from semisam_core.plan import Plan
from server.run_folder import RunFolder
from server.study import StudyFailedError
from tests.server.scripted import Script, contributors, events, fail, run, silent, weights_of
from tests.server.secure_sites import SecureGrid, secure_plan

NAMES = ("alpha", "beta", "delta", "gamma")
DIED = fail(4)  # Flower's code for a ClientApp that was killed


def _expected(sites: SecureGrid, start: dict[str, Tensor], names: tuple[str, ...], number: int) -> dict[str, Tensor]:
    updates = [sites.update(name, start, number) for name in names]
    return {key: sum((each[key].double() for each in updates), torch.zeros(())) / len(updates) for key in start}


def _is_mean(record: RunFolder, sites: SecureGrid, plan: Plan, names: tuple[str, ...], number: int = 1) -> bool:
    """Return whether a round's weights are the mean of these sites' updates."""
    expected = _expected(sites, weights_of(record, number - 1, plan), names, number)
    found = weights_of(record, number, plan)
    return all(torch.allclose(found[key].double(), expected[key], rtol=0, atol=1e-7) for key in expected)


def test_rounds_are_the_mean_of_updates_that_the_server_never_sees(tmp_path: Path) -> None:
    plan = secure_plan()
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    record = run(sites.grid, plan, tmp_path / "run", 4)
    for number in (1, 2):
        assert _is_mean(record, sites, plan, NAMES, number)
    assert contributors(record) == [" ".join(NAMES)] * 2
    assert events(record, "aggregated", "total_weight", "head_weight") == [(16, 0), (16, 0)]
    assert record.records("aggregated")[0]["weights"] == dict.fromkeys(NAMES)
    assert not list((tmp_path / "run").rglob("incoming/*"))
    for vectors in sites.seen.values():
        rounded = vectors[0].view(np.uint8)
        assert np.abs(np.bincount(rounded, minlength=256) / len(rounded) - 1 / 256).max() < 0.004


@pytest.mark.parametrize("how", [DIED, silent], ids=["died", "silent"])
@pytest.mark.parametrize("stage", list(Stage), ids=lambda stage: stage.name.lower())
def test_a_site_lost_at_any_stage_does_not_stop_the_round(tmp_path: Path, stage: Stage, how: Script) -> None:
    plan = secure_plan()
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    sites.grid.scripts["gamma", stage.value, 1] = [how]
    record = run(sites.grid, plan, tmp_path / "run", 4)
    in_sum = NAMES if stage is Stage.UNMASK else NAMES[:3]
    assert _is_mean(record, sites, plan, in_sum)
    assert contributors(record) == [" ".join(in_sum), " ".join(NAMES)]
    assert not record.records("sum-given-up")
    failed = record.records("aggregated")[0]["failed"]
    assert set(failed) == set(NAMES) - set(in_sum)
    assert sites.grid.time.now_s < 300


@pytest.mark.parametrize("stage", [Stage.KEYS, Stage.SHARES, Stage.MASKED], ids=lambda stage: stage.name.lower())
def test_a_sum_that_loses_too_many_begins_anew_with_fresh_keys_and_without_training_again(
    tmp_path: Path, stage: Stage
) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES[:3])
    sites.grid.scripts["beta", stage.value, 1] = [DIED]
    record = run(sites.grid, plan, tmp_path / "run", 3)
    assert _is_mean(record, sites, plan, NAMES[:3])
    assert len(record.records("sum-given-up")) == 1
    assert [each[0] for each in sites.grid.asked if each[1] == MessageType.TRAIN] == list(NAMES[:3])
    for (name, _), vectors in sites.seen.items():
        if len(vectors) > 1:
            assert name != "beta"
            difference = vectors[0] - vectors[1]
            assert len(np.unique(difference)) == len(difference)


@pytest.mark.parametrize("stage", [Stage.KEYS, Stage.SHARES, Stage.MASKED], ids=lambda stage: stage.name.lower())
def test_below_the_threshold_the_run_ends_and_keeps_its_rounds(tmp_path: Path, stage: Stage) -> None:
    plan = secure_plan()
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    for name in ("beta", "gamma"):
        sites.grid.scripts[name, stage.value, 2] = [DIED] * 9
    with pytest.raises(StudyFailedError, match=r"^Round 2: the updates could not be summed securely: 2 sites sent .*3"):
        run(sites.grid, plan, tmp_path / "run", 4)
    record = RunFolder(tmp_path / "run")
    assert contributors(record) == [" ".join(NAMES)]
    assert len(record.records("sum-given-up")) == 3
    assert sites.grid.time.now_s < 300


def test_too_few_shares_to_unmask_end_the_run_after_waiting(tmp_path: Path) -> None:
    plan = secure_plan()
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    for name in ("beta", "gamma"):
        sites.grid.scripts[name, Stage.UNMASK.value, 1] = [DIED] * 9
    with pytest.raises(StudyFailedError, match=r"2 of 4 sites released their shares, 3 are needed"):
        run(sites.grid, plan, tmp_path / "run", 4)
    assert [each[:2] for each in sites.grid.asked].count(("beta", Stage.UNMASK.value)) == 3
    assert sites.grid.time.now_s < 700


def test_a_site_that_returns_while_the_sum_is_unmasked_releases_its_shares(tmp_path: Path) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES[:3])

    def go(grid: Any, sent: Message) -> None:
        node = sent.metadata.dst_node_id
        grid.kill(node)
        grid.time.at(grid.time.now_s + 100, lambda: grid.start(grid.names[node], node))

    for name in ("beta", "delta"):
        sites.grid.scripts[name, Stage.UNMASK.value, 1] = [go]
    record = run(sites.grid, plan, tmp_path / "run", 3)
    assert _is_mean(record, sites, plan, NAMES[:3])
    assert 100 < sites.grid.time.now_s < 250


def test_a_sum_waits_for_sites_that_left_after_training(tmp_path: Path) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES[:3])
    sites.grid.seconds["alpha", MessageType.TRAIN] = 50
    sites.grid.time.at(20, lambda: sites.grid.kill(2))
    sites.grid.time.at(300, lambda: sites.grid.start("beta", 2))
    record = run(sites.grid, plan, tmp_path / "run", 3)
    assert _is_mean(record, sites, plan, NAMES[:3])
    assert events(record, "left", "site") == [("beta",)]


def test_a_sum_does_not_wait_for_ever(tmp_path: Path) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES[:3])
    sites.grid.seconds["alpha", MessageType.TRAIN] = 50
    sites.grid.time.at(20, lambda: sites.grid.kill(2))
    with pytest.raises(StudyFailedError, match=r"2 are connected, 3 are needed; missing: beta"):
        run(sites.grid, plan, tmp_path / "run", 3)
    assert sites.grid.time.now_s < 800


def test_sites_without_a_step_stay_out_of_the_sum_and_do_not_fail(tmp_path: Path) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    sites.steps["beta"] = 0
    record = run(sites.grid, plan, tmp_path / "run", 4)
    assert contributors(record) == ["alpha delta gamma"]
    assert record.records("aggregated")[0]["failed"] == {}
    assert ("beta", Stage.KEYS.value, 1) not in sites.grid.asked


def test_fewer_sites_with_an_update_than_a_sum_needs_end_the_run_with_a_way_out(tmp_path: Path) -> None:
    plan = secure_plan()
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    sites.steps |= {"beta": 0, "gamma": 0}
    with pytest.raises(StudyFailedError, match=r"2 sites have anything to add, a secure sum needs 3.*equal or samples"):
        run(sites.grid, plan, tmp_path / "run", 4)


def _item(name: str, value: bytes | None) -> Callable[[Message], None]:
    """Change all items of a reply's secure record whose names begin so; None removes them."""

    def change(reply: Message) -> None:
        record = dict(reply.content.config_records[SECURE_RECORD])
        for key in [each for each in record if each.startswith(name)]:
            del record[key]
            if value is not None:
                record[key] = value
        reply.content[SECURE_RECORD] = ConfigRecord(record)

    return change


def _extra(name: str, value: Any) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        reply.content.config_records[SECURE_RECORD][name] = value

    return change


def _scalar(reply: Message) -> None:
    reply.content[METRICS_RECORD] = MetricRecord({"labeled": 3})


def _short_vector(reply: Message) -> None:
    array = reply.content.array_records[SPECIALIST_RECORD][MASKED_VECTOR].numpy()
    reply.content.array_records[SPECIALIST_RECORD][MASKED_VECTOR] = type(
        reply.content.array_records[SPECIALIST_RECORD][MASKED_VECTOR]
    )(array[:-1].copy())


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (Stage.KEYS, _item(MASK_KEY, b"nonsense")),
        (Stage.KEYS, _item(MASK_KEY, None)),
        (Stage.KEYS, _item(HEAD, b"x" * 4000)),
        (Stage.KEYS, _extra("note", b"patient 17")),
        (Stage.KEYS, _extra(HEAD, 1)),
        (Stage.KEYS, _scalar),
        (Stage.SHARES, _item("sealed-for.alpha", None)),
        (Stage.SHARES, _extra("sealed-for.stranger", b"x")),
        (Stage.SHARES, _extra("sealed-for.../x", b"x")),
        (Stage.MASKED, _short_vector),
        (Stage.UNMASK, _item(SEED_SHARE + "alpha", None)),
        (Stage.UNMASK, _extra(KEY_SHARE + "alpha", b"x")),
    ],
)
def test_a_malformed_reply_is_rejected_and_its_site_counts_as_lost(
    tmp_path: Path, stage: Stage, change: Callable[[Message], None]
) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    sites.grid.scripts["gamma", stage.value, 1] = [sites.altered("gamma", change)]
    record = run(sites.grid, plan, tmp_path / "run", 4)
    assert _is_mean(record, sites, plan, NAMES if stage is Stage.UNMASK else NAMES[:3])
    refused = [line for line in record.records("refused") if line["site"] == "gamma"]
    assert [(line["kind"], line["rule"] is not None) for line in refused] == [(stage.value, True)]


@pytest.mark.parametrize("share", [SEED_SHARE, KEY_SHARE], ids=["seed", "key"])
def test_a_wrong_share_spoils_the_round_but_ends_it_with_a_sentence(tmp_path: Path, share: str) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    sites.grid.scripts["gamma", Stage.MASKED.value, 1] = [DIED]

    def wrong(reply: Message) -> None:
        record = reply.content.config_records[SECURE_RECORD]
        for name in [each for each in record if each.startswith(share)]:
            value = record[name]
            assert isinstance(value, bytes)
            record[name] = value[:-1] + bytes([value[-1] ^ 1])

    sites.grid.scripts["alpha", Stage.UNMASK.value, 1] = [sites.altered("alpha", wrong)]
    with pytest.raises(StudyFailedError, match=r"^Round 1: the sum cannot be unmasked: .* wrong share or vector"):
        run(sites.grid, plan, tmp_path / "run", 4)


def test_a_server_killed_before_it_unmasked_begins_the_round_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = secure_plan()
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    original = RunFolder.record

    def killed(self: RunFolder, event: str, **content: Any) -> None:
        if event == "unmasking" and content["round"] == 2:
            raise KeyboardInterrupt
        original(self, event, **content)

    monkeypatch.setattr(RunFolder, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        run(sites.grid, plan, tmp_path / "run", 4)
    monkeypatch.undo()
    sites.grid.kill(4)  # gamma, without which the sum may be made: no other was released
    record = run(sites.grid, plan, tmp_path / "run", 3)
    assert _is_mean(record, sites, plan, NAMES[:3], 2)


@pytest.mark.parametrize("all_back", [True, False])
def test_a_server_killed_after_it_unmasked_makes_the_same_sum_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_back: bool
) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_round", _after(RunFolder.save_round, 1, killed))
    with pytest.raises(KeyboardInterrupt):
        run(sites.grid, plan, tmp_path / "run", 4)
    monkeypatch.undo()
    if all_back:
        record = run(sites.grid, plan, tmp_path / "run", 4)
        assert _is_mean(record, sites, plan, NAMES)
        return
    sites.grid.kill(4)
    with pytest.raises(StudyFailedError, match=r"the sum of alpha, beta, delta, gamma was released.*without gamma"):
        run(sites.grid, plan, tmp_path / "run", 3)


def _after(original: Any, calls: int, otherwise: Any) -> Any:
    """Return a function that works so often, and then does something else."""
    left = [calls]

    def patched(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        return original(*arguments, **named) if left[0] >= 0 else otherwise()

    return patched


def test_a_site_that_is_bound_to_a_released_sum_and_drops_out_ends_the_run(tmp_path: Path) -> None:
    plan = secure_plan(rounds=1)
    sites = SecureGrid(tmp_path / "sites", plan, *NAMES)
    record = RunFolder(tmp_path / "run")
    append_json_line(record.metrics_path, {"event": "unmasking", "round": 1, "sites": list(NAMES)})
    sites.grid.scripts["gamma", Stage.MASKED.value, 1] = [DIED] * 9
    with pytest.raises(StudyFailedError, match=r"3 sites sent masked vectors, 4 are needed"):
        run(sites.grid, plan, tmp_path / "run", 4)
