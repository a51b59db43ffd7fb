"""A server killed at any point resumes to the same weights, scores and report."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import server.study
from client.app import app as client_app
from engines.in_process_grid import InProcessGrid
from engines.results import as_json, collect
from semisam_core import files
from semisam_core.contract import weights_sha256
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from server.messages import Mailbox
from server.run_folder import RunFolder
from server.study import Study
from server.updates import UpdateShelf
from tests.conftest import tiny_plan, write_blobs, write_site

PLAN = ("training.rounds=3", "teacher.start=site", "selection=validation")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("hospitals")
    for seed, name in enumerate(("alpha", "beta")):
        write_blobs(folder / "data" / name, 3, 10 * seed)
    return [write_site(folder, "alpha"), write_site(folder, "beta")]


@pytest.fixture(scope="module")
def whole(hospitals: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a study that was not killed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    _study(hospitals, folder, tiny_plan(*PLAN)).execute()
    return folder


def _study(sites: list[Path], folder: Path, plan: Plan) -> Study:
    grid = InProcessGrid(client_app, [{"site-config": str(site)} for site in sites], {})
    return Study(
        plan, grid, RunFolder(folder), "run-" + hashlib.sha256(str(folder).encode()).hexdigest()[:8], len(sites)
    )


def _die_at(owner: object, name: str, moment: Callable[..., bool]) -> None:
    """Kill this process when a function is called and `moment` says so."""
    original = getattr(owner, name)

    def patched(*arguments: Any, **named: Any) -> Any:
        if moment(*arguments, **named):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, name, patched)


def _second(round_number: int) -> Callable[..., bool]:
    """Return a predicate that is true at the second call in a round."""
    calls: list[int] = []

    def moment(*arguments: Any, **named: Any) -> bool:
        calls.append(1)
        return len(calls) == 2 * round_number

    return moment


def _configure() -> None:
    _die_at(Mailbox, "send", lambda _, node, site, kind, number, *rest: (site, kind, number) == ("beta", "train", 2))


def _receive() -> None:
    _die_at(UpdateShelf, "add", _second(2))


def _aggregate() -> None:
    calls: list[int] = []
    _die_at(server.study, "combine", lambda *_: calls.append(1) or len(calls) == 2)


def _save() -> None:
    _die_at(files.os, "replace", lambda _, target: Path(target).name == "round-00002.safetensors")


def _record() -> None:
    _die_at(RunFolder, "record", lambda _, event, **content: event == "aggregated" and content["round"] == 2)


def _evaluate() -> None:
    _die_at(
        RunFolder,
        "record",
        lambda _, event, **content: event == "evaluated" and (content["round"], content["site"]) == (2, "beta"),
    )


def _last_scores() -> None:
    _die_at(RunFolder, "record", lambda _, event, **content: event == "evaluated" and content["final"])


def _select() -> None:
    _die_at(RunFolder, "save_best", lambda *_: True)


def _run_and_die(hook: Callable[[], None], sites: list[Path], folder: Path) -> None:
    torch.set_num_threads(1)
    hook()
    _study(sites, folder, tiny_plan(*PLAN)).execute()


@pytest.mark.parametrize(
    "hook",
    [_configure, _receive, _aggregate, _save, _record, _evaluate, _last_scores, _select],
    ids=lambda h: h.__name__,
)
def test_a_killed_server_resumes_as_if_nothing_had_happened(
    hook: Callable[[], None], hospitals: list[Path], whole: Path, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(hook, hospitals, tmp_path))
    process.start()
    process.join(timeout=120)
    try:
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
        process.join()
    plan = tiny_plan(*PLAN)
    assert not (tmp_path / "best.safetensors").exists()
    _study(hospitals, tmp_path, plan).execute()
    for name in ("checkpoints/round-00003.safetensors", "best.safetensors"):
        assert weights_sha256(load_file(tmp_path / name)) == weights_sha256(load_file(whole / name))
    record, expected = RunFolder(tmp_path), RunFolder(whole)
    for event in ("aggregated", "trained", "selected"):
        assert _facts(record.records(event)) == _facts(expected.records(event))
    assert _scores(record) == _scores(expected)
    assert as_json(collect(tmp_path, {}, plan.class_names)) == as_json(collect(whole, {}, plan.class_names))
    assert list((tmp_path / "incoming").iterdir()) == []


def _scores(record: RunFolder) -> set[tuple[int, str, float]]:
    return {(line["round"], line["site"], line["dice.blob"]) for line in record.records("evaluated")}


def _facts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in lines]


def test_an_interrupted_round_is_not_counted_twice(whole: Path, tmp_path: Path) -> None:
    record = RunFolder(tmp_path)
    for line in read_json_lines(whole / "metrics.jsonl"):
        record.record(**{key: value for key, value in line.items() if key != "time"})
    record.record("resumed", round=1)
    assert {line["round"] for line in record.records("trained")} == {1}
    assert record.records("selected") == []
    assert len(record.records("joined")) == 2
