"""The real `flwr run`: real SuperLink, real sites, real LiteMedSAM; what it writes, and that no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from engines.bundle import APP_SETTINGS, stage_app
from semisam_core.files import read_json_lines
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 900  # starting Flower and labeling with LiteMedSAM take minutes on a busy machine
pytestmark = pytest.mark.timeout(2 * LONGEST_S)
UNLABELED: dict[str, list[str]] = {"labeled": [], "validation": ["case-1"]}


@pytest.fixture
def study(make_site: MakeSite, tmp_path: Path) -> tuple[Path, Path]:
    """Return a plan with LiteMedSAM and a folder of two sites: one labeled, one wholly unlabeled."""
    model = {"lite-medsam": {"weights": "packaged"}}
    shallow = (24, 24, 8)
    make_site("alpha", shape=shallow, data={"labeled": ["case-0", "case-1"]}, generalists=model)
    make_site("beta", cases=2, first_seed=10, shape=shallow, data=UNLABELED, generalists=model)
    plan = tiny_plan(
        "pseudo_labels.generalists=[lite-medsam]",
        "pseudo_labels.prompting.threshold=0.3",
        "pseudo_labels.prompting.slice_step_mm=6.0",
        "pseudo_labels.gates.minimum_volume_ml=0.0",
        "training.steps_per_round=3",
        # Starting Flower's processes is slow on a busy machine.
        "aggregation.join_deadline_s=300",
        "aggregation.round_deadline_s=300",
    )
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    return path, tmp_path / "sites"


@pytest.fixture(autouse=True)
def _nothing_stays_running(tmp_path: Path) -> Iterator[None]:
    yield
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(tmp_path) in " ".join(
                [*process.cmdline(), *process.environ().values()]
            ):
                left.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    assert left == []


def _command(study: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "cli.main", "simulate", "--plan", str(study[0]), "--sites", str(study[1])]
    return [*command, "--out", str(out), "--no-local-baseline", *more]


def _run(command: list[str]) -> tuple[int, str]:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it then ends its own processes, which a kill would leave behind
        process.communicate(timeout=60)
        raise
    return process.returncode, output


@pytest.mark.slow
def test_a_study_by_flwr_run_gives_the_weights_of_the_same_study_in_one_process(
    study: tuple[Path, Path], tmp_path: Path
) -> None:
    code, output = _run(_command(study, tmp_path / "flower"))
    assert code == 0, output
    assert "HD95 mm" in output
    lines = read_json_lines(tmp_path / "flower" / "metrics.jsonl")
    assert [line["event"] for line in lines].count("aggregated") == 2
    assert any(line["event"] == "trained" and line["site"] == "beta" and line["accepted"] > 0 for line in lines)
    assert json.loads((tmp_path / "flower" / "status.json").read_text())["state"] == "completed"
    for name in ("alpha", "beta"):
        (tmp_path / "storage" / name).rename(tmp_path / "storage" / f"{name}-flower")
    code, output = _run(_command(study, tmp_path / "single", "--engine", "in-process"))
    assert code == 0, output
    one, other = (load_file(tmp_path / name / "best.safetensors") for name in ("flower", "single"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.slow
def test_a_secure_study_by_flwr_run_gives_the_weights_of_the_same_study_in_one_process(
    make_site: MakeSite, tmp_path: Path
) -> None:
    for k, name in enumerate(("alpha", "beta", "gamma")):
        make_site(name, first_seed=10 * k, shape=(24, 24, 8), generalists={"lite-medsam": {"weights": "packaged"}})
    plan = tiny_plan(
        "pseudo_labels=null",
        "training.rounds=1",
        "aggregation.secure={stage_deadline_s: 300}",
        "aggregation.admission={norm_factor: null}",
        "aggregation.minimum_sites=3",
        "aggregation.weights=equal",
        "aggregation.join_deadline_s=300",
    )
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    hashes = []
    for engine in ("flower", "in-process"):
        code, output = _run(_command((path, tmp_path / "sites"), tmp_path / engine, "--engine", engine))
        assert code == 0, output
        lines = read_json_lines(tmp_path / engine / "metrics.jsonl")
        hashes += [(line["sha256"], line["weights"]) for line in lines if line["event"] == "aggregated"]
    assert hashes[0] == hashes[1]
    assert set(hashes[0][1]) == {"alpha", "beta", "gamma"}


@pytest.mark.slow
def test_a_failed_study_exits_with_one_though_flower_reports_nothing(study: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        for image in (tmp_path / "data" / name / "images").iterdir():
            image.write_bytes(b"torn")
    code, output = _run(_command(study, tmp_path / "run"))
    assert code == 1
    assert "no-usable-case" in output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_ctrl_c_cleans_up_and_resume_continues_the_run(study: tuple[Path, Path], tmp_path: Path) -> None:
    more = ("--set", "training.rounds=3", "--set", "pseudo_labels=null")
    process = subprocess.Popen(
        _command(study, tmp_path / "run", *more), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline and not (metrics.exists() and '"aggregated"' in metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    code, output = _run([sys.executable, "-m", "cli.main", "simulate", "--resume", str(tmp_path / "run")])
    assert code == 0, output
    done = [line["round"] for line in read_json_lines(metrics) if line["event"] == "aggregated"]
    assert done == [1, 2, 3]


@pytest.mark.slow
def test_flwr_run_works_as_a_researcher_types_it(study: tuple[Path, Path], tmp_path: Path) -> None:
    from engines.processes import ProcessTree

    binary = Path(sys.executable).parent
    home = tmp_path / "flwr-home"
    home.mkdir()
    environment = dict(os.environ) | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{binary}{os.pathsep}{os.environ['PATH']}",
    }
    run_config = f'plan="{study[0]}" sites="{study[1]}" run-folder="{tmp_path / "run"}"'
    command = [str(binary / "flwr"), "run", ".", "--stream", "-c", run_config]
    command += ["--federation-config", "num-supernodes=2 client-resources-num-cpus=1"]
    log_file = tmp_path / "log"
    with log_file.open("wb") as log, ProcessTree() as tree:
        for _ in range(4):  # Flower's command gives its SuperLink 15 s to start, too few on a busy machine
            process = tree.start(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
            process.wait(timeout=LONGEST_S)
            if "Failed to start local SuperLink" not in log_file.read_text().rpartition("Starting local SuperLink")[2]:
                break
            time.sleep(20)
    status = tmp_path / "run" / "status.json"
    assert status.exists(), log_file.read_text()
    assert json.loads(status.read_text())["state"] == "completed"


def test_the_staged_app_matches_the_projects_own_settings(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    staged = tomllib.loads(APP_SETTINGS)["tool"]["flwr"]["app"]
    for key in ("publisher", "components", "config"):
        assert staged[key] == project[key]
    app = stage_app(tmp_path)
    assert sorted(path.name for path in app.iterdir()) == ["client", "pyproject.toml", "semisam_core", "server"]


def test_site_files_and_tests_are_kept_out_of_the_bundle() -> None:
    from flwr.cli.build import build_fab_from_disk

    bundle = build_fab_from_disk(ROOT)
    import io
    import zipfile

    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert "server/app.py" in names
    assert "semisam_core/plan.py" in names
    assert not [name for name in names if name.startswith(("site_configs", "tests", "demo", "docs"))]
