"""The Flower app that is submitted, and its bundle: the same bytes for the same code."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path

import client
import semisam_core
import server

APP_SETTINGS = """\
[tool.flwr.app]
publisher = "fedsemisam"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
plan = ""
sites = ""
num-sites = 0
run-folder = ""
"""


def stage_app(work: Path) -> Path:
    """Copy the apps and the core, and nothing else, into a folder to bundle; return it."""
    app = work / "app"
    shutil.rmtree(app, ignore_errors=True)
    for package in (client, server, semisam_core):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, app / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    version = importlib.metadata.version("fedsemisam")
    project = f'[project]\nname = "fedsemisam"\nversion = "{version}"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
    (app / "pyproject.toml").write_text(project + APP_SETTINGS, encoding="utf-8")
    return app


def build_bundle() -> bytes:
    """Return the Flower app bundle (FAB) of the installed code."""
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory(prefix="semisam-") as work:
        return bytes(build_fab_from_disk(stage_app(Path(work))))
