"""A site with a full disk refuses by rule `storage`, leaves no torn file, and recovers when there is room."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

import semisam_core
from client.app import app
from semisam_core.contract import REFUSAL_RECORD, SPECIALIST_RECORD, STUDY_RECORD
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from tests.server.replies import arrays

MakeSite = Callable[..., Path]


def _train(plan: Plan, site: Path) -> RecordDict:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
    study: dict[str, Any] = {"plan": plan.canonical_json(), "plan-hash": plan.hash, "run": "run", "round": 1}
    content = RecordDict({STUDY_RECORD: ConfigRecord(study | {"code-version": semisam_core.__version__})})
    weights = new_specialist(plan).state_dict()
    content[SPECIALIST_RECORD] = arrays(weights)
    config = {"site-config": str(site)}
    context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
    return app(Message(content, 1, MessageType.TRAIN), context).content


def _train_with_small_files(plan: Plan, site: Path, limit: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    answer.send(str(_train(plan, site).config_records[REFUSAL_RECORD]["rule"]))


@pytest.mark.parametrize("limit", [2000, 12000])
def test_a_site_with_a_full_disk_refuses_and_recovers_when_there_is_room(
    make_site: MakeSite, tmp_path: Path, plan: Plan, limit: int
) -> None:
    site = make_site()
    hears, says = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_train_with_small_files, args=(plan, site, limit, says)
    )
    process.start()
    try:
        assert hears.poll(60)
        assert hears.recv() == "storage"
    finally:
        process.kill()
        process.join()
    storage = tmp_path / "storage" / "alpha"
    assert [path for path in storage.rglob(".*") if path.is_file()] == []
    for path in storage.rglob("*.safetensors"):
        load_file(path)
    (line,) = read_json_lines(storage / "audit.jsonl")
    assert line["refused"] == "storage"
    assert "OSError" in line["reason_kept_here"]
    assert SPECIALIST_RECORD in _train(plan, site)
