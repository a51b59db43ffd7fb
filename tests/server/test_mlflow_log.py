"""A run in MLflow: the real package, its database in a local folder, no network."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from semisam_core.errors import ConfigError
from semisam_core.files import write_json
from semisam_core.plan import Plan, write_plan
from server.mlflow_log import (
    PACKAGES,
    ask_for_mlflow,
    keep_report,
    mlflow_loggers,
    parameters,
    usable_folder,
)
from server.run_folder import RunFolder
from server.run_log import RunLog
from server.scalars import RoundScalars
from tests.conftest import tiny_plan

CODE = "c0de" * 16
ABOUT: dict[str, Any] = {"seconds": 1.0, "weights": {"alpha": 1.0}}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty store; making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return folder


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes((empty_store / "mlflow.db").read_bytes())
    return folder


@pytest.fixture
def run_folder(store: Path, tmp_path: Path) -> RunFolder:
    """Return the folder of a run that is to be logged to MLflow."""
    folder = RunFolder(tmp_path / "run")
    write_plan(folder.path / "plan.yaml", tiny_plan("pseudo_labels=null"))
    write_json(folder.path / "run.json", {"run": "tiny-1"})
    ask_for_mlflow(folder.path, store, "atrium", CODE)
    return folder


def _log(folder: RunFolder) -> RunLog:
    plan = tiny_plan()
    return RunLog(folder, plan, mlflow_loggers(folder.path, plan, "tiny-1"))


def _train(folder: RunFolder, number: int, dice: float) -> None:
    folder.record("trained", round=number, site="alpha", steps=2, accepted=3)
    folder.record("aggregated", round=number, **ABOUT)
    folder.record("evaluated", round=number, site="alpha", validation=1, **{"dice.blob": dice})
    folder.record("scored", round=number, sites=1)


def _runs(store: Path) -> list[Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.get_experiment_by_name("atrium")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def _history(store: Path, run: Run, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]


def test_a_run_has_parameters_metrics_by_round_tags_and_artifacts(store: Path, run_folder: RunFolder) -> None:
    log = _log(run_folder)
    for number in (1, 2):
        _train(run_folder, number, number / 4)
    log.end("completed")
    (run_folder.path / "report.html").write_text("<!doctype html>")
    keep_report(run_folder.path, run_folder.path / "report.html")
    (run,) = _runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.rounds"] == str(tiny_plan().training.rounds)
    assert json.loads(run.data.params["task.name"]) == "tiny"
    assert run.data.params.keys() == parameters(tiny_plan()).keys()
    assert _history(store, run, "dice/alpha") == [(1, 0.25), (2, 0.5)]
    assert _history(store, run, "pseudo-labels.accepted/alpha") == [(1, 3), (2, 3)]
    assert run.data.tags["semisam.study"] == "atrium"
    assert run.data.tags["semisam.code-hash"] == CODE
    assert run.data.tags["semisam.plan-hash"] == tiny_plan().hash
    kept = {path.name: path.read_text() for path in (store / "artifacts").rglob("*.*") if path.is_file()}
    assert kept.keys() == {"plan.yaml", "report.html"}
    assert kept["plan.yaml"] == (run_folder.path / "plan.yaml").read_text()


def test_a_resumed_run_takes_the_place_of_the_one_before_and_keeps_its_notes(
    store: Path, run_folder: RunFolder
) -> None:
    _log(run_folder)
    _train(run_folder, 1, 0.25)
    _train(run_folder, 2, 0.5)
    (before,) = _runs(store)
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    client.set_tag(before.info.run_id, "mlflow.note.content", "the coil was changed")
    client.set_tag(before.info.run_id, "mlflow.runName", "first try")
    log = _log(run_folder)
    run_folder.record("resumed", round=1)
    _train(run_folder, 2, 0.75)
    log.end("failed")
    (run,) = _runs(store)
    assert run.info.run_id != before.info.run_id
    assert _history(store, run, "dice/alpha") == [(1, 0.25), (2, 0.75)]
    assert run.info.status == "FAILED"
    assert (run.data.tags["mlflow.note.content"], run.info.run_name) == ("the coil was changed", "first try")


def test_runs_of_other_studies_and_other_runs_are_left_alone(store: Path, run_folder: RunFolder) -> None:
    for run in ("one", "other"):
        logger = mlflow_loggers(run_folder.path, tiny_plan(), run)[0]
        logger.begin()
        logger.log([RoundScalars(1, 1.0, {"mean/dice": 0.5})])
    assert {run.data.tags["semisam.run"] for run in _runs(store)} == {"one", "other"}


def test_more_scalars_than_mlflow_takes_at_once_are_all_kept(store: Path, run_folder: RunFolder) -> None:
    (logger,) = mlflow_loggers(run_folder.path, tiny_plan(), "tiny-1")
    logger.begin()
    logger.log([RoundScalars(n, 1.0, {f"dice/site-{k}": k / 100 for k in range(100)}) for n in range(1, 12)])
    with sqlite3.connect(store / "mlflow.db") as database:
        assert database.execute("select count(*) from metrics").fetchone() == (1100,)


def test_a_plan_is_flat_and_no_value_is_longer_than_mlflow_allows(plan: Plan) -> None:
    flat = parameters(plan)
    assert json.loads(flat["aggregation.rule"]) == plan.aggregation.rule
    assert all(len(value) <= 6000 and len(key) <= 250 for key, value in flat.items())
    assert json.loads(parameters(tiny_plan("pseudo_labels=null"))["pseudo_labels"]) is None


def test_a_store_that_cannot_be_written_stops_no_run(run_folder: RunFolder, store: Path) -> None:
    (store / "mlflow.db").write_text("no database " * 100)
    log = _log(run_folder)
    _train(run_folder, 1, 0.25)
    log.end("completed")
    keep_report(run_folder.path, run_folder.path / "report.html")
    (line, *_) = run_folder.records("not-logged")
    assert line["logger"] == "MLflow"
    assert "not a database" in line["reason"]
    assert len(run_folder.records("aggregated")) == 1


def test_a_run_that_was_not_asked_to_is_not_logged(tmp_path: Path, plan: Plan) -> None:
    assert mlflow_loggers(tmp_path, plan, "run") == []
    keep_report(tmp_path, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_before_the_run_starts(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()  # a folder of that name is no package
    found, hidden = importlib.util.find_spec, PathFinder.find_spec(package, [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: hidden if name == package else found(name))
    with pytest.raises(ConfigError, match=rf"--mlflow: {package} is not installed here; install it with `pip install"):
        usable_folder(tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["a?b", "a#b", "100%"])
def test_a_path_that_would_read_as_something_else_in_an_address_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not contain"):
        usable_folder(tmp_path / name)


def test_a_folder_with_spaces_will_do(run_folder: RunFolder, store: Path, tmp_path: Path) -> None:
    moved = usable_folder(store.rename(tmp_path / "my store"))
    ask_for_mlflow(run_folder.path, moved, "atrium", CODE)
    _log(run_folder).end("completed")
    assert len(_runs(moved)) == 1


OFFLINE = """
import socket, sys
reached = []
def refuse(self, address, *_):
    reached.append(address)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
from pathlib import Path
from semisam_core.plan import load_plan
from server.mlflow_log import mlflow_loggers, keep_report
from server.scalars import RoundScalars
folder = Path(sys.argv[1])
(logger,) = mlflow_loggers(folder, load_plan(folder / "plan.yaml"), "tiny-1")
logger.begin()
logger.log([RoundScalars(1, 1.0, {"mean/dice": 0.5})])
logger.end("completed")
(folder / "report.html").write_text("report")
keep_report(folder, folder / "report.html")
import time
time.sleep(1)
print(reached)
"""


def test_nothing_is_sent_anywhere(run_folder: RunFolder, store: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(run_folder.path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MLFLOW", "CI"))}
        | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "store"}  # no mlruns in the working directory
    assert _runs(store)[0].data.metrics == {"mean/dice": 0.5}
