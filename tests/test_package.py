"""The package alone, installed from a wheel without the checkout, as `pip install` leaves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a program in a folder; it belongs to a new environment with the wheel.

    Dependencies are those of this environment.
    """
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(_copy(folder / "source"))]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=100)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file brings packages, but not the .pth files beside them, such as the editable install's.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    new = ["--python", str(environment / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *new], check=True, capture_output=True, timeout=300)
    for script in Path(sys.executable).parent.glob("fl*"):  # Flower's programs, with the new environment's Python
        _, _, code = script.read_text().partition("\n")
        (environment / "bin" / script.name).write_text(f"#!{environment}/bin/python\n{code}")
        (environment / "bin" / script.name).chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(work: Path, program: str, *words: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / program), *words],
            cwd=work,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def _copy(folder: Path) -> Path:
    """Return a copy of what git tracks, since building leaves files behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_every_room_and_its_files_are_in_the_wheel(installed: Run, tmp_path: Path) -> None:
    code = (
        "import json, pathlib, client, review, reports, site_configs;"
        "print(json.dumps([client.__file__, *map(str, pathlib.Path(client.__file__).parents[1].rglob('*.js'))]))"
    )
    client, *scripts = json.loads(installed(tmp_path, "python", "-c", code))
    assert str(ROOT) not in client
    assert {Path(each).name for each in scripts} >= {"niivue.umd.js", "viewer.js", "page.js"}


@pytest.mark.parametrize("engine", ["in-process", "flower"])
def test_the_demo_runs_without_a_checkout(installed: Run, tmp_path: Path, engine: str) -> None:
    installed(tmp_path, "semisam", "examples")
    installed(tmp_path, "semisam", "phantom", "--out", "demo/data")
    short = ("training.rounds=1", "training.steps_per_round=1", "pseudo_labels=null", "evaluation.every_rounds=1")
    changes = [word for each in short for word in ("--set", each)]
    study = ("--plan", "site_configs/phantom/plan.yaml", "--sites", "site_configs/phantom/sites", "--out", "demo/run")
    installed(tmp_path, "semisam", "simulate", *study, "--no-local-baseline", "--engine", engine, *changes)
    assert json.loads((tmp_path / "demo/run/status.json").read_text())["state"] == "completed"
    assert (tmp_path / "demo/run/report.html").exists()
