"""The command line: mistakes stop it with one message before any work, and the exit status tells how a run ended."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console
from typer.testing import CliRunner

from cli.main import app
from semisam_core.files import read_json_lines
from tests.conftest import TINY_PLAN

MakeSite = Callable[..., Path]
SUPERVISED = {k: v for k, v in TINY_PLAN.items() if k != "pseudo_labels"}


@pytest.fixture
def study(make_site: MakeSite, tmp_path: Path) -> tuple[Path, Path]:
    """Return a plan file without generalists and a folder of two sites."""
    for name in ("alpha", "beta"):
        make_site(name, first_seed=len(name), generalists={})
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(SUPERVISED))
    return plan, tmp_path / "sites"


def _call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, " ".join(result.output.split())


def _simulate(study: tuple[Path, Path], out: Path, *more: str) -> tuple[int, str]:
    plan, sites = study
    return _call("simulate", "--plan", plan, "--sites", sites, "--out", out, "--engine", "in-process", *more)


def test_check_lists_what_each_site_would_use(study: tuple[Path, Path]) -> None:
    code, output = _call("check", "--plan", study[0], "--sites", study[1])
    assert code == 0
    assert "alpha" in output
    assert "plan hash" in output


@pytest.mark.parametrize("width", [60, 80])
def test_check_prints_whole_values_on_narrow_terminals_and_in_logs(
    study: tuple[Path, Path], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = "lite-medsam, sam, sam-med3d, medsam"
    monkeypatch.setattr("experiments.checks.usable_generalists", lambda *_: models.split(", "))
    monkeypatch.setattr("experiments.checks._check_weights", lambda *_: None)
    monkeypatch.setattr("cli.main.console", Console(width=width))
    result = CliRunner().invoke(app, ["check", "--plan", str(study[0]), "--sites", str(study[1])])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    shown = [line for line in lines if models in line]
    assert len(shown) == 2
    assert all(len(line) <= width for line in lines if "plan hash" not in line and len(line.split()) > 1)


def test_a_study_in_one_process_ends_with_a_table_results_and_pictures(
    study: tuple[Path, Path], tmp_path: Path
) -> None:
    code, output = _simulate(study, tmp_path / "run")
    assert code == 0, output
    assert "Dice" in output
    assert "HD95 mm" in output
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())["sites"]
    assert [(each["site"], each["target"]) for each in results] == [("alpha", "blob"), ("beta", "blob")]
    assert all(each["local_dice"] is not None and each["federated_dice"] is not None for each in results)
    assert {path.name for path in (run / "pictures").iterdir()} == {"alpha.png", "beta.png"}
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {f"round-0000{k}.safetensors" for k in range(3)}
    assert (run / "best.safetensors").exists()
    assert (run / "plan.yaml").exists()
    assert f"Report: {run / 'report.html'}" in output
    page = (run / "report.html").read_text()
    assert f"{results[0]['federated_dice']:.3f}" in page
    (run / "report.html").unlink()
    assert _call("report", run) == (0, str(run / "report.html"))
    assert (run / "report.html").read_text() == page


def test_the_local_baseline_takes_the_same_steps_from_the_same_start(study: tuple[Path, Path], tmp_path: Path) -> None:
    _simulate(study, tmp_path / "run")
    alone = read_json_lines(tmp_path / "run" / "local" / "alpha" / "metrics.jsonl")
    together = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [
        [line["steps"] for line in lines if line["event"] == "trained" and line["site"] == "alpha"]
        for lines in (alone, together)
    ]
    assert steps[0] == steps[1]
    first = [
        run / "checkpoints" / "round-00000.safetensors" for run in (tmp_path / "run" / "local/alpha", tmp_path / "run")
    ]
    assert first[0].read_bytes()[-1000:] == first[1].read_bytes()[-1000:]


def test_a_run_is_logged_to_mlflow_if_asked_for_and_also_once_it_is_over(
    study: tuple[Path, Path], tmp_path: Path
) -> None:
    short = ("--no-local-baseline", "--set", "training.rounds=1")
    code, output = _simulate(study, tmp_path / "run", *short, "--mlflow", str(tmp_path / "store"))
    assert code == 0, output
    code, output = _call("simulate", "--resume", tmp_path / "run", "--mlflow", tmp_path / "later")
    assert code == 0, output
    for store in ("store", "later"):
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / store}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        scored = json.loads((tmp_path / "run" / "results.json").read_text())["sites"]
        assert run.data.metrics["dice/alpha"] == scored[0]["federated_dice"]
        assert run.info.status == "FINISHED"
        assert re.fullmatch("[0-9a-f]{64}", run.data.tags["semisam.code-hash"])
        assert [path.name for path in (tmp_path / store / "artifacts").rglob("report.html")] == ["report.html"]


def test_a_missing_mlflow_is_said_before_anything_is_done(
    study: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.mlflow_log._installed", lambda package: False)
    code, output = _simulate(study, tmp_path / "run", "--mlflow", str(tmp_path / "store"))
    assert code == 2
    assert "--mlflow: mlflow is not installed here; install it with `pip install" in output
    assert not (tmp_path / "run").exists()


def test_overrides_are_in_the_plan_of_the_run_folder(study: tuple[Path, Path], tmp_path: Path) -> None:
    _simulate(study, tmp_path / "run", "--no-local-baseline", "--set", "training.rounds=1")
    kept = yaml.safe_load((tmp_path / "run" / "plan.yaml").read_text())
    assert kept["training"]["rounds"] == 1


def test_a_study_in_which_every_site_fails_exits_with_status_1_and_says_why(
    study: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("alpha", "beta"):
        for image in (tmp_path / "data" / name / "images").iterdir():
            image.write_bytes(b"torn")
    code, output = _simulate(study, tmp_path / "run", "--no-local-baseline")
    assert code == 1
    assert "no-usable-case" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--plan and --sites are required"),
        (("--engine", "magic"), "accepted: flower, in-process"),
        (("--resume", "nowhere"), "not a run folder"),
        (("--plan", "absent.yaml", "--sites", "."), "absent.yaml"),
    ],
)
def test_wrong_options_stop_with_one_message(arguments: tuple[str, ...], says: str) -> None:
    code, output = _call("simulate", *arguments)
    assert code == 2
    assert says in output
    assert "Traceback" not in output


def test_a_wrong_plan_stops_before_any_work(study: tuple[Path, Path], tmp_path: Path) -> None:
    code, output = _simulate(study, tmp_path / "run", "--set", "training.round=3")
    assert code == 2
    assert "training.round: unknown key" in output
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_files_is_not_overwritten(study: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    code, output = _simulate(study, tmp_path / "run")
    assert code == 2
    assert "the folder is not empty" in output


def test_two_sites_with_the_same_name_stop_before_any_work(study: tuple[Path, Path], tmp_path: Path) -> None:
    text = (study[1] / "alpha.yaml").read_text()
    (study[1] / "copy.yaml").write_text(text.replace("storage/alpha", "storage/other"))
    code, output = _simulate(study, tmp_path / "run")
    assert code == 2
    assert "each site needs its own" in output


def test_resuming_a_completed_run_only_prints_its_results(study: tuple[Path, Path], tmp_path: Path) -> None:
    _simulate(study, tmp_path / "run", "--no-local-baseline")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, output = _call("simulate", "--resume", tmp_path / "run")
    assert code == 0
    assert "federated" in output
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_phantom_hospitals_are_written_once(tmp_path: Path) -> None:
    assert _call("phantom", "--out", tmp_path / "data", "--cases", "2")[0] == 0
    files = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.nii.gz"))
    assert len(files) == 12
    assert files[0] == "east/images/east-00.nii.gz"
    assert "already" in _call("phantom", "--out", tmp_path / "data", "--cases", "2")[1]


def test_check_prints_the_memory_of_a_training_step(study: tuple[Path, Path]) -> None:
    code, output = _call("check", "--plan", study[0], "--sites", study[1])
    assert code == 0
    assert "Specialist unet: about" in output


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"weights": "gone.pth", "sha256": "a" * 64},
            "gone.pth': there is no such file. Published as: medsam_vit_b.pth",
        ),
        ({"weights": "packaged"}, "no package ships these weights; give a file. Published as: medsam_vit_b.pth"),
    ],
)
def test_check_names_missing_weights_and_where_they_are_published(
    make_site: MakeSite, tmp_path: Path, entry: dict[str, str], says: str
) -> None:
    make_site("gamma", generalists={"medsam": entry})
    plan = tmp_path / "medsam.yaml"
    plan.write_text(yaml.safe_dump(TINY_PLAN | {"pseudo_labels": {"generalists": ["medsam"]}}))
    code, output = _call("check", "--plan", plan, "--sites", tmp_path / "sites")
    assert code == 2
    assert "site gamma: generalists.medsam" in output
    assert says.split(".pth': ")[-1][:40] in output
    assert "Licence: Apache-2.0" in output


def test_check_names_the_extra_that_a_generalist_needs(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sam2" else found(name, *rest))
    make_site("gamma", generalists={"sam2": {"weights": "sam2.pt", "sha256": "a" * 64}})
    plan = tmp_path / "sam2.yaml"
    plan.write_text(yaml.safe_dump(TINY_PLAN | {"pseudo_labels": {"generalists": ["sam2"]}}))
    code, output = _call("check", "--plan", plan, "--sites", tmp_path / "sites")
    assert code == 2
    assert "install fedsemisam[sam2]" in output
