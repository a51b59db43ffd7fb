"""Rules of the repository: which room imports which, pinned dependencies, nothing generated in git."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("semisam_core", "client", "server")
UPPER_ROOMS = ("deployment", "engines", "experiments", "intake", "release", "reports", "review", "cli")

IMAGE_PACKAGES = {"nibabel", "SimpleITK", "pydicom", "highdicom", "h5py", "matplotlib", "PIL", "imageio"}
IMAGE_ROOMS = (
    "client",
    "intake",
    "release",
    "reports.site",
    "semisam_core.data",
    "semisam_core.pseudo_labels",
    "semisam_core.reporting.overview",
)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_core_client_and_server_import_nothing_but_the_core(room: str) -> None:
    forbidden = {*ROOMS, *UPPER_ROOMS, "tests"} - {room, "semisam_core"}
    for path in (ROOT / room).rglob("*.py"):
        assert not _imports(path) & forbidden, path


@pytest.mark.parametrize(
    "room", [*ROOMS, "deployment", "engines", "experiments", "intake", "release", "reports", "review"]
)
def test_nothing_imports_the_command_line(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert "cli" not in _imports(path), path


def test_no_room_knows_the_rooms_above_it() -> None:
    for room, forbidden in (
        ("engines", {"experiments", "deployment", "intake", "release", "reports", "review"}),
        ("deployment", {"experiments", "release", "review"}),
        ("intake", {"engines", "experiments", "deployment", "release", "reports", "review", "server"}),
        ("release", {"experiments", "review"}),
        ("experiments", {"review"}),
        ("reports", {"experiments", "deployment", "release", "review"}),
        ("review", {"engines", "experiments", "server"}),
    ):
        for path in (ROOT / room).rglob("*.py"):
            assert not _imports(path) & forbidden, path


@pytest.mark.parametrize(("side", "other"), [("site", "lead"), ("lead", "site")])
def test_the_two_sides_of_deployment_do_not_import_each_other(side: str, other: str) -> None:
    for path in (ROOT / "deployment" / side).rglob("*.py"):
        assert f"deployment.{other}" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(("side", "other"), [("site", "lead"), ("lead", "site")])
def test_the_two_reports_do_not_import_each_other_nor_does_the_other_side(side: str, other: str) -> None:
    own = [*(ROOT / "reports").glob("*.py"), *(ROOT / "reports" / side).rglob("*.py")]
    for path in [*own, *(ROOT / "deployment" / side).rglob("*.py")]:
        assert f"reports.{other}" not in path.read_text(encoding="utf-8"), path


def test_the_leads_report_reaches_nothing_that_reads_images() -> None:
    """Not by any chain of imports, those inside functions included."""
    reached, waiting = set(), [f"reports.lead.{path.stem}" for path in (ROOT / "reports" / "lead").glob("*.py")]
    while waiting:
        name = waiting.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        path = path if path.exists() else path.with_suffix("") / "__init__.py"
        if name in reached or not path.exists():
            continue
        reached.add(name)
        waiting += [name.rpartition(".")[0], *_imported_names(path)]
        assert not _imports(path) & IMAGE_PACKAGES, path
    assert {"reports.page", "semisam_core.contract", "server.metrics_log"} <= reached
    assert not [name for name in reached if name.startswith(IMAGE_ROOMS)]


def _imported_names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_the_command_line_only_parses_and_prints() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "cli").rglob("*.py")}
    assert sum(lines.values()) < 1300, lines


def test_every_direct_dependency_has_an_exact_version_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z0-9_.-]+)==(\S+)", line):
            pinned[match[1].lower().replace("_", "-")] = match[2]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = _normal(re.split(r"[<>=\[; ]", requirement)[0])
        assert name in pinned, name


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requested = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    declared = {_normal(re.split(r"[<>=\[; ]", requirement)[0]) for requirement in requested}
    shipped = importlib.metadata.packages_distributions()
    for room in (*ROOMS, *UPPER_ROOMS):
        for path in (ROOT / room).rglob("*.py"):
            for name in _imports(path) - set(sys.stdlib_module_names) - {*ROOMS, *UPPER_ROOMS}:
                distributions = {_normal(each) for each in shipped.get(name, [name])}
                assert distributions & declared, f"{path.name} imports {name} from {sorted(distributions)}"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_constraints_hold_versions_and_no_addresses() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+-]+", line), line


def test_nothing_generated_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = listed.stdout.split()
    assert not [name for name in tracked if name.endswith((".nii", ".nii.gz", ".dcm", ".pth", ".safetensors"))]
    assert not [name for name in tracked if name.startswith(("demo/", "runs/", ".venv/"))]


def test_every_file_of_a_room_that_is_not_code_is_packed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {
        path
        for room, patterns in tools["package-data"].items()
        for each in patterns
        for path in (ROOT / room).glob(each)
    }
    rooms = (*ROOMS, *UPPER_ROOMS, "site_configs")
    files = {path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == packed


def test_the_version_that_server_and_sites_compare_is_the_projects() -> None:
    import semisam_core

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert semisam_core.__version__ == project["version"]


def test_commands_that_only_read_a_plan_do_not_import_monai() -> None:
    site, lead = "deployment.site", "deployment.lead"
    modules = f"client.site_config, {site}.supervisor, {site}.status, {lead}.run, {lead}.status"
    code = f"import sys, {modules}; print('monai' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"
