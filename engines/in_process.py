"""A whole study in one process: the same apps and messages, without Flower's engine."""

from __future__ import annotations

from pathlib import Path

from client.app import SIMULATION
from client.app import app as client_app
from client.site_config import load_site_config, load_site_folder
from engines.in_process_grid import run_in_process
from semisam_core.errors import ConfigError
from server.app import app as server_app


def execute(plan: Path, sites: Path, run_folder: Path, only: str | None = None) -> None:
    """Run the study of `plan` over the sites of a folder, or over one of them.

    Raises:
        ConfigError: a file is invalid, or no site is called `only`.
        StudyFailedError: the study could not continue.
    """
    load_site_folder(sites)
    paths = sorted(path for path in sites.resolve().iterdir() if path.suffix in {".yaml", ".yml"})
    chosen = [path for path in paths if only is None or load_site_config(path).site == only]
    if not chosen:
        raise ConfigError(f"{sites}: no site is called {only}.")
    node_configs: list[dict[str, str | int]] = [{"site-config": str(path), SIMULATION: 1} for path in chosen]
    run_config: dict[str, str | int] = {
        "plan": str(plan.resolve()),
        "sites": str(sites.resolve()),
        "num-sites": len(chosen),
        "run-folder": str(run_folder.resolve()),
    }
    run_in_process(server_app, client_app, node_configs, run_config)
