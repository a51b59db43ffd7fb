"""Machines as people have them: a user id without a name or home, a temporary folder with a long path."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from engines import simulation
from engines.flower_control import FlowerError
from tests.conftest import tiny_plan, write_blobs, write_site

ROOT = Path(__file__).resolve().parents[2]
NAMELESS = 123_456
PROGRAMS = ("flower-superlink", "flower-superexec", "flwr-serverapp", "flwr-simulation")


def _open_to_all(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that any user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def python(folder: Path) -> Path:
    """Return an interpreter with this one's packages and Flower's programs that the nameless user can run."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    version = f"python3.{sys.version_info.minor}"
    found = [
        os.path.realpath(sys.executable),
        *(shutil.which(version, path=at) for at in ("/usr/local/bin", "/usr/bin")),
    ]
    base = next((Path(each).resolve() for each in found if each and _open_to_all(Path(each).resolve())), None)
    if base is None or not _open_to_all(ROOT):
        pytest.skip("no interpreter, or not this code, can be reached by another user")
    packages = folder / "venv" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    inherited = [each for each in sys.path if each.endswith("site-packages")]
    (packages / "inherited.pth").write_text("\n".join([str(ROOT), *inherited]))
    (folder / "venv" / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    programs = folder / "venv" / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(base)
    for entry in importlib.metadata.distribution("flwr").entry_points:
        if entry.name in PROGRAMS:
            script = programs / entry.name
            script.write_text(f"#!{programs}/python\nfrom {entry.module} import {entry.attr}\n{entry.attr}()\n")
            script.chmod(0o755)
    return programs / "python"


def _as_nameless(python: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    owned = [path for path in folder.rglob("*") if "venv" not in path.relative_to(folder).parts]
    for path in (folder, *owned):
        os.chown(path, NAMELESS, NAMELESS)
    return subprocess.run(
        [str(python), *arguments],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        cwd=folder,
        user=NAMELESS,
        group=NAMELESS,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def _study(folder: Path) -> list[str]:
    for seed, name in enumerate(("alpha", "beta")):
        write_blobs(folder / "data" / name, 3, 10 * seed)
        write_site(folder, name, generalists={})
    # Starting Flower's processes is slow on a busy machine.
    waits = ("aggregation.join_deadline_s=300", "aggregation.round_deadline_s=300")
    plan = tiny_plan("pseudo_labels=null", "training.rounds=1", *waits)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    paths = ("--plan", "plan.yaml", "--sites", "sites", "--out", "run")
    return ["-m", "cli.main", "simulate", *paths, "--no-local-baseline"]


def test_the_core_imports_for_a_user_id_without_name_and_home(python: Path, folder: Path) -> None:
    done = _as_nameless(python, folder, "-c", "import semisam_core.training, engines.bundle as b; b.build_bundle()")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("home", [{}, {"HOME": "/"}], ids=["no home", "the root as home"])
def test_a_user_id_without_a_name_simulates(python: Path, folder: Path, home: dict[str, str]) -> None:
    done = _as_nameless(python, folder, *_study(folder), **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "completed"


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_does_not_stop_flowers_engine(folder: Path) -> None:
    long = folder / ("t" * 120)
    long.mkdir()
    before = set(Path("/tmp").glob("ray-*"))
    environment = os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *_study(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(Path("/tmp").glob("ray-*")) == before


def test_where_no_short_folder_can_be_written_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    long = folder / ("t" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(simulation, "SHORT_FOLDERS", (str(folder / "missing"),))
    with pytest.raises(FlowerError, match=r"no more than \d+ bytes.*Set TMPDIR to a short path"):
        simulation.ray_folder()


def test_the_folder_for_ray_is_private_and_short(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    long = folder / ("t" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with simulation.ray_folder() as made:
        assert len(f"{made}/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.12".encode()) <= 107
        assert Path(made).stat().st_mode & 0o777 == 0o700
