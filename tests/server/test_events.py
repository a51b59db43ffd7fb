"""A run's events in words, in the log of `flwr run` as well."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.app import app as client_app
from engines.in_process import run_in_process
from semisam_core.contract import BUCKETED_COUNTS, COUNTS_WORD
from server.app import app as server_app
from server.events import Narrator
from tests.conftest import tiny_plan

JOINED = {"event": "joined", "site": "north", "labeled": 5.0, "unlabeled": 0.0, "validation": 5.0, "quarantined": 0.0}
TRAINED = {"event": "trained", "round": 1, "site": "north", "steps": 3.0, "accepted": 5.0, "gated": 0.0}


@pytest.mark.parametrize(
    ("joined", "said"),
    [
        (JOINED, "pseudo-labels 5 accepted, 0 gated"),
        (JOINED | {COUNTS_WORD: BUCKETED_COUNTS}, "pseudo-labels 5-9 accepted, 0 gated"),
    ],
)
def test_counts_are_buckets_if_the_sites_joining_said_so_however_long_ago(joined: dict[str, Any], said: str) -> None:
    at_once, resumed = Narrator(), Narrator([joined])
    assert str(at_once.describe(joined)).startswith("north joined: 5")
    assert at_once.describe(TRAINED) == resumed.describe(TRAINED) == f"round 1: north trained 3 steps, {said}"


def test_the_servers_log_has_a_line_for_each_event(
    make_site: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tiny_plan("pseudo_labels=null").model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": 1, "run-folder": str(tmp_path / "run")}
    flower = logging.getLogger("flwr")
    flower.addHandler(handler)
    try:
        run_in_process(server_app, client_app, [{"site-config": str(make_site("alpha"))}], config)
    finally:
        flower.removeHandler(handler)
    told = [line for line in said if line.startswith(("alpha joined", "round "))]
    starts = [
        "alpha joined: 1 labeled",
        "round 1: alpha trained",
        "round 1/2 aggregated",
        "round 1: alpha Dice",
        "round 2: alpha trained",
        "round 2/2 aggregated",
        "round 2: alpha Dice",
    ]
    assert [line.startswith(start) for line, start in zip(told, starts, strict=True)] == [True] * len(starts)
