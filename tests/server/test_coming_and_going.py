"""Sites that die, come back, and join, by which node and name. Time is scripted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MessageType
from flwr.common.constant import ErrorCode

from semisam_core.contract import SITE_RECORD
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


def test_a_site_that_comes_back_takes_part_in_the_next_round(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(50, lambda: grid.kill(2))
    grid.time.at(500, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert events(record, "rejoined", "site", "round") == [("beta", 1)]
    assert grid.time.now_s < 3050  # nobody waited for it in the first round


def test_a_site_that_is_back_within_the_window_still_takes_part_in_the_round(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(30, lambda: grid.kill(2))
    grid.time.at(90, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha beta"] * 3
    assert grid.time.now_s < 3000 + 120 + 10


def test_a_site_that_is_offline_for_a_moment_is_not_waited_for_in_vain(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)

    def blink() -> None:
        grid.kill(2)
        grid.start("beta", 2)

    grid.time.at(500, blink)
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert events(record, "rejoined", "site", "round") == [("beta", 1)]
    assert grid.time.now_s < 3050


def test_a_site_under_a_new_node_takes_the_place_of_its_old_one(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(50, lambda: grid.kill(2))
    grid.time.at(500, lambda: grid.start("beta", 77))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]


def test_a_second_living_site_of_one_name_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.time.at(200, lambda: grid.start("beta", 3))
    grid.time.at(1200, lambda: grid.kill(2))
    record = run(grid, study_plan(rounds=4), tmp_path, 2)
    assert events(record, "refused", "site", "reason")[0] == ("beta", "a second site of this name")
    assert contributors(record)[2:] == ["alpha beta"] * 2
    late_ones = [site for site, kind, _ in grid.asked if kind == QUERY and site == "beta"]
    assert len(late_ones) == 3  # itself, the second refused once, the second taken once the first was gone


def test_a_node_that_comes_back_under_another_name_has_no_second_vote(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", "gamma", train_s=100)
    for k in range(5):
        grid.time.at(10 + 4 * k, partial(grid.start, f"mallory-{k}", 3))
    record = run(grid, study_plan(rounds=1), tmp_path, 3)
    assert contributors(record) == ["alpha beta"]
    assert ("mallory-0", "its node takes part under another name") in events(record, "refused", "site", "reason")


def test_a_site_takes_part_under_the_name_that_its_key_was_admitted_by_and_no_other(tmp_path: Path) -> None:
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


def test_a_site_that_joins_slowly_delays_nobody(tmp_path: Path) -> None:
    grid = grid_of("alpha", train_s=100)
    grid.seconds["beta", QUERY] = 50
    grid.time.at(10, lambda: grid.start("beta", 2))
    record = run(grid, study_plan("aggregation.rejoin_window_s=0"), tmp_path, 1)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
    assert grid.time.now_s < 310


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (refuse("version"), "refused by rule version"),
        (refuse("plan-hash"), "refused by rule plan-hash"),
        (garbage, "names no site"),
        (fail(ErrorCode.CLIENT_APP_CRASHED), "ClientApp was killed"),
    ],
)
def test_a_site_that_may_not_join_is_recorded_and_the_others_go_on(
    tmp_path: Path, script: Callable[..., Message], words: str
) -> None:
    grid = grid_of("alpha", "beta")
    grid.always["beta", QUERY] = script
    record = run(grid, study_plan(), tmp_path, 2)
    (reason,) = [line["reason"] for line in record.records("refused")]
    assert words in reason
    assert contributors(record) == ["alpha"] * 3


def test_a_site_of_another_plan_is_refused_at_joining(tmp_path: Path) -> None:
    def other_plan(grid: ScriptedGrid, sent: Message) -> Message:
        return answer_well(
            grid, sent, **{SITE_RECORD: ConfigRecord({"site": "beta", "round": 0, "plan-hash": "0" * 64})}
        )

    grid = grid_of("alpha", "beta")
    grid.always["beta", QUERY] = other_plan
    record = run(grid, study_plan(), tmp_path, 2)
    assert [line["reason"] for line in record.records("refused")] == ["the reply is about another round or plan"]
    assert contributors(record) == ["alpha"] * 3


def test_a_site_that_refused_to_join_is_asked_again_when_it_has_been_started_anew(tmp_path: Path) -> None:
    grid = grid_of("alpha", "beta", train_s=1000)
    grid.scripts["beta", QUERY, 0] = [refuse("site-config")]
    grid.time.at(100, lambda: grid.kill(2))
    grid.time.at(200, lambda: grid.start("beta", 2))
    record = run(grid, study_plan(), tmp_path, 2)
    assert contributors(record) == ["alpha", "alpha beta", "alpha beta"]
