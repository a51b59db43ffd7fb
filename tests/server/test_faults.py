"""What happens to sites during a study, and how the server reacts. Time is scripted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.constant import ErrorCode

from semisam_core.contract import SITE_RECORD
from server.run_folder import RunFolder
from server.study import StudyFailedError
from tests.server.scripted import (
    HOUR,
    ScriptedGrid,
    answer_well,
    contributors,
    events,
    fail,
    garbage,
    grid_of,
    refuse,
    run,
    silent,
    study_plan,
    weights_of,
)
from tests.server.scripted import (
    TRAIN as STEPS,
)

TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE


def _status(record: RunFolder) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((record.path / "status.json").read_text())
    return content


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# Deadlines


def test_a_round_ends_as_soon_as_all_sites_have_replied(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=100)
    run(grid, study_plan(), tmp_path, 2)
    assert 300 <= grid.time.now_s < 310


def test_a_site_that_hangs_costs_one_deadline_and_is_named(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.scripts["beta", TRAIN, 1] = [silent]
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert events(record, "silent", "round", "names", "seconds") == [(1, ["beta"], HOUR)]
    assert HOUR <= grid.time.now_s < HOUR + 10


def test_a_late_reply_is_recorded_and_never_aggregated(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=10)

    def late(grid: ScriptedGrid, sent: Message) -> Message | None:
        if grid.time.now_s < HOUR + 15:
            grid.scripts["beta", TRAIN, 1].append(late)
            return None
        return answer_well(grid, sent)

    grid.scripts["beta", TRAIN, 1] = [late]
    grid.seconds["alpha", TRAIN] = 30
    record = run(grid, study_plan(), tmp_path / "late", 2)
    assert contributors(record)[0] == "alpha"
    ((number, site, seconds),) = events(record, "late", "round", "site", "seconds")
    assert (number, site) == (1, "beta")
    assert 0 < seconds < 20
    without = grid_of("alpha", "beta")
    without.scripts["beta", TRAIN, 1] = [silent]
    expected = run(without, study_plan(), tmp_path / "silent", 2)
    assert contributors(record) == contributors(expected)
    assert _same(weights_of(record, 3, study_plan()), weights_of(expected, 3, study_plan()))


def test_a_reply_after_its_deadline_is_late_even_while_its_round_still_waits_for_others(tmp_path: Path) -> None:
    def late(grid: ScriptedGrid, sent: Message) -> Message | None:
        if grid.time.now_s < HOUR + 10:
            grid.scripts["beta", TRAIN, 1].append(late)
            return None
        return answer_well(grid, sent)

    grid = grid_of("alpha", "beta", train_s=10)
    grid.scripts["beta", TRAIN, 1] = [late]
    grid.seconds["gamma", TRAIN] = HOUR - 20
    grid.time.at(60, lambda: grid.start("gamma", 3))  # joins the round a minute late, so its deadline is later
    record = run(grid, study_plan(rounds=1), tmp_path, 2)
    assert contributors(record) == ["alpha gamma"]
    assert events(record, "late", "round", "site") == [(1, "beta")]


def test_the_server_does_not_wait_for_a_reply_after_flower_has_dropped_the_message(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=10)
    grid.scripts["beta", TRAIN, 1] = [silent]
    grid.seconds["alpha", TRAIN] = HOUR - 10  # the second round outlasts the lifetime of the first one's message
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert record.records("late") == []


def test_a_site_still_training_is_asked_for_scores_only_at_the_end(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.scripts["beta", TRAIN, 1] = [silent]
    run(grid, study_plan("evaluation.every_rounds=1"), tmp_path, 2)
    scored = [(site, number) for site, kind, number in grid.asked if kind == EVALUATE]
    assert ("beta", 1) not in scored
    assert ("beta", 3) in scored


def test_the_server_waits_for_sites_that_connect_one_after_another(tmp_path: Path) -> None:
    grid = grid_of("alpha")
    grid.time.at(20, lambda: grid.start("beta", 2))
    grid.time.at(40, lambda: grid.start("gamma", 3))
    record = run(grid, study_plan(), tmp_path, 3)
    assert contributors(record)[0] == "alpha beta gamma"


def test_the_server_holds_one_update_in_memory_at_a_time(tmp_path: Path) -> None:
    grid = grid_of(*(f"site-{k}" for k in range(12)))
    shelved: list[int] = []

    def counting(grid: ScriptedGrid, sent: Message) -> Message:
        shelved.append(len(list((tmp_path / "incoming").glob("*.safetensors"))))
        return answer_well(grid, sent)

    for name in grid.names.values():
        grid.always[name, TRAIN] = counting
    run(grid, study_plan(rounds=1), tmp_path, 12)
    assert shelved == list(range(12))  # each is on disk before the next is pulled
    assert list((tmp_path / "incoming").iterdir()) == []


# Bad replies


@pytest.mark.parametrize("script", [refuse("storage"), garbage, fail(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)])
def test_a_bad_reply_costs_only_its_own_site_the_round(tmp_path: Path, script: Callable[..., Message]) -> None:
    grid = grid_of("alpha", "beta")
    grid.scripts["beta", TRAIN, 2] = [script]
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha beta", "alpha", "alpha beta"]
    ((number, site, reason),) = events(record, "refused", "round", "site", "reason")
    assert (number, site) == (2, "beta")
    assert "secret" not in reason


def test_a_reply_that_flower_cannot_unpack_costs_only_its_own_site_the_round(tmp_path: Path) -> None:
    def torn(grid: ScriptedGrid, sent: Message) -> Message:
        raise ValueError("no such object")

    grid = grid_of("alpha", "beta")
    grid.scripts["alpha", TRAIN, 2] = [torn]
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha beta", "beta", "alpha beta"]
    assert events(record, "refused", "site", "reason") == [("alpha", "the reply cannot be read")]


def _busy(*_: object) -> Any:
    asked = httpx.Request("POST", "https://superlink/v1/runtime/")
    raise httpx.HTTPStatusError("database is locked", request=asked, response=httpx.Response(500, request=asked))


def test_a_superlink_that_is_busy_for_a_moment_costs_no_site_its_work(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.scripts["alpha", TRAIN, 2] = [_busy, _busy]
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    assert record.records("refused") == []


@pytest.mark.parametrize("call", ["push_messages", "get_nodes"])
def test_a_superlink_that_is_busy_for_a_moment_does_not_end_the_run(tmp_path: Path, call: str) -> None:
    grid = grid_of("alpha", "beta", train_s=100)
    well = getattr(grid, call)
    grid.time.at(99.9, lambda: setattr(grid, call, _busy))
    grid.time.at(101.5, lambda: setattr(grid, call, well))
    record = run(grid, study_plan(minimum=2), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3


def test_an_update_in_the_name_of_another_site_is_rejected(tmp_path: Path) -> None:
    plan = study_plan()

    def forged(grid: ScriptedGrid, sent: Message) -> Message:
        about = {"site": "alpha", "round": 1, "plan-hash": plan.hash}
        return answer_well(grid, sent, **{SITE_RECORD: ConfigRecord(about)})

    grid = grid_of("alpha", "beta")
    grid.scripts["beta", TRAIN, 1] = [forged]
    record = run(grid, plan, tmp_path, 2)
    assert contributors(record)[0] == "alpha"
    assert events(record, "refused", "site", "reason") == [
        ("beta", "the reply is not from the site that joined from its node")
    ]


def test_a_site_that_keeps_failing_is_excluded_and_asked_again_later(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.always["beta", TRAIN] = refuse("training-diverged")
    plan = study_plan("aggregation.exclusion={after_failures: 2, rounds: 2}", rounds=7)
    record = run(grid, plan, tmp_path, 2)
    asked = [number for site, kind, number in grid.asked if (site, kind) == ("beta", TRAIN)]
    assert asked == [1, 2, 5]  # excluded from 3 and 4; failed again in 5, excluded from 6 and 7
    assert events(record, "excluded", "site", "round", "until") == [("beta", 2, 4), ("beta", 5, 7)]
    assert {line["reason"] for line in record.records("excluded")} == {"refused by rule training-diverged"}
    assert contributors(record) == ["alpha"] * 7


def test_a_successful_round_resets_the_count_of_failures(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    for number in (1, 2, 4, 5):
        grid.scripts["beta", TRAIN, number] = [refuse("training-diverged")]
    record = run(grid, study_plan(rounds=6), tmp_path, 2)
    assert record.records("excluded") == []


def test_exclusion_never_takes_a_study_below_its_quorum(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma")
    grid.scripts["gamma", TRAIN, 1] = [refuse("training-diverged")]
    grid.scripts["beta", TRAIN, 2] = [refuse("training-diverged")]
    plan = study_plan("aggregation.exclusion={after_failures: 1, rounds: 5}", minimum=2)
    record = run(grid, plan, tmp_path, 3)
    assert events(record, "excluded", "site", "round") == [("gamma", 1), ("beta", 2)]
    assert contributors(record) == ["alpha beta", "alpha gamma", "alpha beta gamma"]


def test_a_resumed_server_remembers_which_sites_are_excluded(tmp_path: Path) -> None:
    plan = study_plan("aggregation.exclusion={after_failures: 2, rounds: 2}", rounds=6)
    grid = grid_of("alpha", "beta")
    grid.always["beta", TRAIN] = refuse("training-diverged")

    def dies(grid: ScriptedGrid, sent: Message) -> Message:
        raise KeyboardInterrupt

    grid.scripts["alpha", TRAIN, 4] = [dies]
    with pytest.raises(KeyboardInterrupt):
        run(grid, plan, tmp_path, 2)
    again = grid_of("alpha", "beta")
    again.always["beta", TRAIN] = refuse("training-diverged")
    run(again, plan, tmp_path, 2)
    assert [number for site, kind, number in again.asked if (site, kind) == ("beta", TRAIN)] == [5]


# What the server keeps, and what it tells sites


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam"])
def test_a_study_whose_newest_checkpoint_is_corrupt_resumes_from_the_one_before(tmp_path: Path, optimizer: str) -> None:
    rate = "null" if optimizer == "none" else "0.5"
    plan = study_plan(f"aggregation.server_optimizer={{name: {optimizer}, learning_rate: {rate}}}", rounds=4)
    whole = run(grid_of("alpha", "beta"), plan, tmp_path / "whole", 2)
    record = run(grid_of("alpha", "beta"), plan, tmp_path / "torn", 2)
    path = tmp_path / "torn" / "checkpoints" / "round-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    grid = grid_of("alpha", "beta")
    run(grid, plan, tmp_path / "torn", 2)
    assert {number for _, kind, number in grid.asked if kind == TRAIN} == {4}
    assert _same(weights_of(record, 4, plan), weights_of(whole, 4, plan))
    assert events(record, "set-aside", "checkpoint") == [(4,)]


def test_a_site_is_told_once_which_rule_rejected_its_reply(tmp_path: Path) -> None:
    plan, told = study_plan(), []

    def listening(grid: ScriptedGrid, sent: Message) -> Message:
        study = sent.content.config_records["study"]
        told.append((study["round"], study.get("rejected"), study.get("rejected-round")))
        steps = {"metrics": MetricRecord(dict(STEPS) | {"steps": 0})} if study["round"] == 1 else {}
        return answer_well(grid, sent, **steps)

    grid = grid_of("alpha", "beta")
    grid.always["beta", TRAIN] = listening
    record = run(grid, plan, tmp_path, 2)
    assert told == [(1, None, None), (2, "steps-and-change-disagree", 1), (3, None, None)]
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]


def test_a_hostile_site_cannot_stop_a_robust_rule_by_sending_nonsense(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma")
    grid.always["gamma", TRAIN] = lambda grid, sent: answer_well(grid, sent, more=ConfigRecord({"x": 1}))
    record = run(grid, study_plan("aggregation.rule=median", minimum=3), tmp_path, 3)
    assert contributors(record) == ["alpha beta"] * 3
    assert grid.time.now_s < 10


def test_a_reply_without_a_name_is_rejected_like_any_other_nonsense(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma")
    grid.scripts["gamma", TRAIN, 1] = [garbage]
    record = run(grid, study_plan("aggregation.rule=median", minimum=3), tmp_path, 3)
    assert contributors(record) == ["alpha beta", "alpha beta gamma", "alpha beta gamma"]
    assert events(record, "refused", "site", "rule") == [("gamma", "records-not-as-agreed")]


@pytest.mark.parametrize(
    ("rule", "minimum", "hostile"),
    [("median", 3, 2), ("median", 5, 3), ("trimmed-mean", 5, 2), ("krum", 5, 2), ("multi-krum", 5, 2)],
)
def test_a_round_with_more_rejections_than_the_rule_tolerates_does_not_count(
    tmp_path: Path, rule: str, minimum: int, hostile: int
) -> None:
    grid = grid_of(*(f"site-{k}" for k in range(minimum)))
    for k in range(hostile):
        grid.always[f"site-{k}", TRAIN] = lambda grid, sent: answer_well(grid, sent, more=ConfigRecord({"x": 1}))
    plan = study_plan(f"aggregation.rule={rule}", minimum=minimum)
    with pytest.raises(StudyFailedError, match=f"{minimum - hostile} sites contributed, the plan needs {minimum}"):
        run(grid, plan, tmp_path, minimum)


# Too few sites


def test_a_round_waits_for_a_quorum_and_names_the_missing_sites(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=100)
    seen: list[dict[str, Any]] = []
    grid.time.at(50, lambda: grid.kill(2))
    grid.time.at(300, lambda: seen.append(json.loads((tmp_path / "status.json").read_text())))
    grid.time.at(400, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(minimum=2), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    assert [site for site, kind, number in grid.asked if (kind, number) == (TRAIN, 1)] == ["alpha", "beta", "beta"]
    assert seen[0]["state"] == "running"
    assert seen[0]["waiting_for"] == ["beta"]
    assert "Round 1: 1 sites contributed, the plan needs 2. Waiting until" in seen[0]["reason"]
    assert events(record, "waiting", "round", "sites") == [(1, ["beta"])]


def test_a_quorum_that_is_never_reached_ends_the_study_at_the_limit_and_keeps_all_rounds(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=100)
    grid.time.at(150, lambda: grid.kill(2))
    plan = study_plan(minimum=2)
    with pytest.raises(StudyFailedError, match=r"Round 2: 1 sites contributed, the plan needs 2. beta: .*heartbeats"):
        run(grid, plan, tmp_path, 2)
    assert 700 < grid.time.now_s < 900
    assert RunFolder(tmp_path).last_round() == 1
    again = grid_of("alpha", "beta")
    whole = run(grid_of("alpha", "beta"), plan, tmp_path / "whole", 2)
    assert _same(weights_of(run(again, plan, tmp_path, 2), 3, plan), weights_of(whole, 3, plan))


def test_a_round_does_not_wait_for_sites_whose_refusal_will_not_pass(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.always["beta", TRAIN] = refuse("training-diverged")
    with pytest.raises(StudyFailedError, match="beta: refused by rule training-diverged"):
        run(grid, study_plan(minimum=2), tmp_path, 2)
    assert grid.time.now_s < 10


def test_a_site_whose_disk_was_full_is_asked_again_while_a_quorum_is_missing(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.scripts["beta", TRAIN, 1] = [refuse("storage"), refuse("storage")]
    record = run(grid, study_plan(minimum=2), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    assert grid.time.now_s < 70


@pytest.mark.parametrize("rule", ["process-ended", "out-of-time", "internal-error", "audit-log"])
def test_a_refusal_that_may_pass_is_asked_again_while_a_quorum_is_missing(tmp_path: Path, rule: str) -> None:
    grid = grid_of("alpha", "beta")
    grid.scripts["beta", TRAIN, 1] = [refuse(rule)]
    record = run(grid, study_plan(minimum=2), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    assert grid.time.now_s < 40


def test_a_site_is_asked_at_most_three_times_per_round(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.always["beta", TRAIN] = refuse("storage")
    with pytest.raises(StudyFailedError, match="beta: refused by rule storage"):
        run(grid, study_plan(minimum=2), tmp_path, 2)
    assert [site for site, kind, _ in grid.asked if kind == TRAIN].count("beta") == 3


def test_the_status_names_the_sites_being_waited_for(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma")
    grid.seconds["beta", TRAIN] = grid.seconds["gamma", TRAIN] = 100
    seen: list[dict[str, Any]] = []
    grid.time.at(50, lambda: seen.append(json.loads((tmp_path / "status.json").read_text())))
    run(grid, study_plan(), tmp_path, 3)
    (status,) = seen
    assert (status["phase"], status["round"], status["waiting_for"]) == ("training", 1, ["beta", "gamma"])
