"""How commands end when something is wrong: one sentence on standard error and an exit status, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cli.errors import readable_errors
from cli.main import app
from semisam_core.errors import CaseError, ConfigError
from tests.conftest import TINY_PLAN, write_blobs, write_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ConfigError("plan.yaml: [seed] is missing"), 2, "plan.yaml: [seed] is missing"),
        (CaseError("case-1: torn"), 2, "case-1: torn"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "a/b: No such file or directory."),
        (OSError("the disk took only part of a line"), 2, "the disk took only part of a line"),
        (KeyboardInterrupt(), 130, "Interrupted. Resume with --resume."),
    ],
)
def test_errors_for_people_become_a_sentence_and_a_status(
    error: BaseException, status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, readable_errors("Resume with --resume."):
        raise error
    assert caught.value.exit_code == status
    assert capsys.readouterr().err.strip() == says


def test_mistakes_in_the_program_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return a folder with a plan, one site, and a table of its cases."""
    plan = {key: value for key, value in TINY_PLAN.items() if key != "pseudo_labels"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    write_blobs(tmp_path / "data" / "alpha", 3)
    write_site(tmp_path, "alpha", generalists={})
    (tmp_path / "sites.csv").write_text("case,site,split\ncase-0,alpha,train\n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    return tmp_path


COMMANDS = {
    "simulate": {"--plan": "plan.yaml", "--sites": "sites", "--out": "out"},
    "compare": {"--plan": "plan.yaml", "--sites": "sites", "--out": "out"},
    "check": {"--plan": "plan.yaml", "--sites": "sites"},
    "init-sites": {
        "--images": "data/alpha/images",
        "--labels": "data/alpha/labels",
        "--table": "sites.csv",
        "--out": "out",
        "--storage": "storage",
    },
    "phantom": {"--out": "out"},
}
BAD_PATHS = {
    "a user without a home folder": "~nobody-here/x",
    "a loop of links": "loop/x",
    "a name that is too long": "x" * 5000,
    "below a file": "file/x",
}


@pytest.mark.parametrize("path", BAD_PATHS.values(), ids=list(BAD_PATHS))
@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in COMMANDS.items() for option in options]
)
def test_a_path_that_cannot_be_used_is_a_sentence(
    study: Path, monkeypatch: pytest.MonkeyPatch, command: str, option: str, path: str
) -> None:
    if (option, path) == ("--storage", BAD_PATHS["below a file"]):
        pytest.skip("storage is only named here; it is created at the site")
    monkeypatch.chdir(study)
    options = COMMANDS[command] | {option: path}
    result = CliRunner().invoke(app, [command, *(word for pair in options.items() for word in pair)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)  # not an error that Python would print with a traceback
    assert path[:20] in result.output
    assert len(result.output) < 12_000
    assert not (study / "out").exists()


def test_an_output_folder_that_cannot_be_written_to_is_a_sentence(study: Path) -> None:
    """Root may write everywhere but to the kernel's own folders."""
    for command in ("simulate", "compare", "init-sites", "phantom"):
        options = COMMANDS[command] | {"--out": "/proc/semisam"}
        words = [command, *(word for pair in options.items() for word in pair)]
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *words],
            cwd=study,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "--out /proc/semisam: this folder cannot be written to" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["images", "labels", "storage"])
def test_a_home_folder_that_does_not_exist_in_a_site_file_is_a_sentence(study: Path, key: str) -> None:
    changes = {"storage": {"folder": "~nobody-here/x"}} if key == "storage" else {"data": {key: "~nobody-here/x"}}
    write_site(study, "alpha", generalists={}, **changes)
    result = CliRunner().invoke(app, ["check", "--plan", str(study / "plan.yaml"), "--sites", str(study / "sites")])
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"alpha.yaml: {'storage.folder' if key == 'storage' else f'data.{key}'} ~nobody-here/x" in said
