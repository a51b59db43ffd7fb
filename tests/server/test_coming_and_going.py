"""Sites that die, return and join, and under which node and name. Time is scripted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MessageType
from flwr.common.constant import ErrorCode

from semisam_core.contract import SITE_RECORD
from server.study import StudyFailedError
from tests.server.scripted import (
    ScriptedGrid,
    answer_well,
    contributors,
    events,
    fail,
    garbage,
    grid_of,
    refuse,
    run,
    study_plan,
)

QUERY = MessageType.QUERY


def test_a_site_that_is_killed_does_not_stop_the_round(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma", train_s=100)
    grid.time.at(50, lambda: grid.kill(2))
    record = run(grid, study_plan(), tmp_path, 3)
    assert contributors(record) == ["alpha gamma"] * 3
    assert events(record, "left", "site") == [("beta",)]
    (reason,) = {line["reason"] for line in record.records("refused")}
    assert "heartbeats" in reason
    assert grid.time.now_s < 320


def test_a_site_that_returns_takes_part_in_the_next_round(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(50, lambda: grid.kill(2))
    grid.time.at(500, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert events(record, "rejoined", "site", "round") == [("beta", 1)]
    assert grid.time.now_s < 3050  # the first round did not wait for it


def test_a_site_that_returns_within_the_window_still_takes_part_in_the_round(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(30, lambda: grid.kill(2))
    grid.time.at(90, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    assert grid.time.now_s < 3000 + 120 + 10


def test_the_round_does_not_wait_for_a_site_that_was_offline_for_a_moment(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)

    def blink() -> None:
        grid.kill(2)
        grid.start("beta", 2)

    grid.time.at(500, blink)
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert events(record, "rejoined", "site", "round") == [("beta", 1)]
    assert grid.time.now_s < 3050


def test_a_site_under_a_new_node_replaces_its_old_node(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(50, lambda: grid.kill(2))
    grid.time.at(500, lambda: grid.start("beta", 77))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]


def test_a_second_connected_site_of_the_same_name_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(200, lambda: grid.start("beta", 3))
    grid.time.at(1200, lambda: grid.kill(2))
    record = run(grid, study_plan(rounds=4), tmp_path, 2)
    assert events(record, "refused", "site", "reason")[0] == ("beta", "a second site of this name")
    assert contributors(record)[2:] == ["alpha beta"] * 2
    late_ones = [site for site, kind, _ in grid.asked if kind == QUERY and site == "beta"]
    assert len(late_ones) == 3  # itself, the second refused once, the second taken once the first was gone


def test_a_node_that_returns_under_another_name_has_no_second_vote(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma", train_s=100)
    for k in range(5):
        grid.time.at(10 + 4 * k, partial(grid.start, f"mallory-{k}", 3))
    record = run(grid, study_plan(rounds=1), tmp_path, 3)
    assert contributors(record) == ["alpha beta"]
    assert ("mallory-0", "its node takes part under another name") in events(record, "refused", "site", "reason")


def test_a_site_takes_part_only_under_the_name_its_key_was_admitted_with(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma")
    grid.registered = {1: "alpha", 2: "beta", 3: "mallory"}
    grid.time.at(0.5, lambda: grid.start("alpha", 1))  # offline for a moment: its name is free
    record = run(grid, study_plan(), tmp_path, 3)
    assert contributors(record) == ["alpha beta"] * 3
    assert events(record, "refused", "site", "reason") == [("gamma", "its key was admitted under another name")]


def test_a_new_site_may_join_a_running_study(tmp_path: Path) -> None:
    grid = grid_of("alpha", train_s=1000)
    grid.time.at(500, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 1)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert events(record, "joined", "site") == [("alpha",), ("beta",)]


def test_a_site_that_joins_slowly_delays_no_other(tmp_path: Path) -> None:
    grid = grid_of("alpha", train_s=100)
    grid.seconds["beta", QUERY] = 50
    grid.time.at(10, lambda: grid.start("beta", 2))
    record = run(grid, study_plan("aggregation.rejoin_window_s=0"), tmp_path, 1)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert grid.time.now_s < 310


def _joins(grid: ScriptedGrid, site: str) -> int:
    return sum((name, kind) == (site, QUERY) for name, kind, _ in grid.asked)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (refuse("version"), "refused by rule version"),
        (refuse("plan-hash"), "refused by rule plan-hash"),
        (refuse("site-config"), "refused by rule site-config"),
        (garbage, "names no site"),
    ],
)
def test_a_site_that_cannot_join_for_good_is_asked_once_and_not_waited_for(
    tmp_path: Path, script: Callable[..., Message], words: str
) -> None:
    grid = grid_of("alpha", "beta")
    grid.always["beta", QUERY] = script
    record = run(grid, study_plan(rounds=2), tmp_path, 2)
    (reason,) = [line["reason"] for line in record.records("refused")]
    assert words in reason
    assert contributors(record) == ["alpha"] * 2
    assert _joins(grid, "beta") == 1
    assert grid.time.now_s < 10


# Reasons for which a site cannot join now, and may a moment later


PATIENT = "aggregation.join_deadline_s=600"


@pytest.mark.parametrize("rule", ["process-ended", "out-of-time", "storage", "internal-error", "audit-log"])
def test_a_site_that_could_not_join_for_a_reason_that_may_pass_is_asked_again_before_the_study_starts(
    tmp_path: Path, rule: str
) -> None:
    grid = grid_of("alpha", "beta", "gamma")
    grid.scripts["gamma", QUERY, 0] = [refuse(rule)]
    record = run(grid, study_plan(PATIENT, minimum=3), tmp_path, 3)
    assert contributors(record) == ["alpha beta gamma"] * 3
    assert events(record, "refused", "site", "reason") == [("gamma", f"refused by rule {rule}")]
    assert _joins(grid, "gamma") == 2
    assert 30 <= grid.time.now_s < 40


def test_a_site_whose_worker_is_killed_while_it_joins_is_asked_again(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.registered = {1: "alpha", 2: "beta"}
    grid.scripts["beta", QUERY, 0] = [fail(ErrorCode.CLIENT_APP_CRASHED)]
    record = run(grid, study_plan(PATIENT, minimum=2), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    ((site, reason),) = events(record, "refused", "site", "reason")
    assert site == "beta"  # its reply carries no name, but its key does
    assert "ClientApp was killed" in reason


def test_a_site_that_cannot_join_is_asked_less_and_less_often_until_the_join_deadline(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    asked: list[float] = []

    def full(grid: ScriptedGrid, sent: Message) -> Message:
        asked.append(round(grid.time.now_s, -1))
        return refuse("storage")(grid, sent)

    grid.always["beta", QUERY] = full
    with pytest.raises(StudyFailedError, match=r"1 sites joined, the plan needs 2. beta: refused by rule storage"):
        run(grid, study_plan(PATIENT, minimum=2), tmp_path, 2)
    assert asked == [0, 30, 90, 210, 450]
    assert 600 <= grid.time.now_s < 610


def test_a_study_with_enough_sites_waits_for_three_tries_of_another_and_then_starts(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta")
    grid.always["beta", QUERY] = refuse("internal-error")
    seen: list[dict[str, Any]] = []
    grid.time.at(50, lambda: seen.append(json.loads((tmp_path / "status.json").read_text())))
    record = run(grid, study_plan(PATIENT), tmp_path, 2)
    assert contributors(record) == ["alpha"] * 3
    assert _joins(grid, "beta") == 3
    assert 90 <= grid.time.now_s < 100
    (status,) = seen
    assert status["waiting_for"] == ["beta"]
    assert status["reason"] == "1 of 2 sites have joined. Asking again: beta (refused by rule internal-error)."


def test_a_site_that_could_not_join_at_the_start_joins_during_a_round_once_it_can(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.scripts["beta", QUERY, 0] = [refuse("storage")] * 4
    record = run(grid, study_plan(PATIENT), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]


def test_a_round_short_of_sites_waits_for_one_that_cannot_join_yet(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=100)
    grid.time.at(50, lambda: grid.kill(2))
    grid.time.at(60, lambda: grid.scripts["beta", QUERY, 0].append(refuse("process-ended")))
    grid.time.at(60, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(minimum=2), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3


def test_a_site_with_another_plan_cannot_join(tmp_path: Path) -> None:
    def other_plan(grid: ScriptedGrid, sent: Message) -> Message:
        return answer_well(
            grid, sent, **{SITE_RECORD: ConfigRecord({"site": "beta", "round": 0, "plan-hash": "0" * 64})}
        )

    grid = grid_of("alpha", "beta")
    grid.always["beta", QUERY] = other_plan
    record = run(grid, study_plan(), tmp_path, 2)
    assert [line["reason"] for line in record.records("refused")] == ["the reply is about another round or plan"]
    assert contributors(record) == ["alpha"] * 3


def test_a_site_that_refused_to_join_is_asked_again_after_a_restart(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.scripts["beta", QUERY, 0] = [refuse("site-config")]
    grid.time.at(100, lambda: grid.kill(2))
    grid.time.at(200, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]


def test_a_restart_too_short_to_be_seen_offline_counts_as_well(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.scripts["beta", QUERY, 0] = [refuse("site-config")]

    def restart() -> None:
        grid.kill(2)
        grid.start("beta", 2)

    grid.time.at(100, restart)
    record = run(grid, study_plan("aggregation.rejoin_window_s=200"), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
