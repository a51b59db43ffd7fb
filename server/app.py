"""The ServerApp: reads the run config, runs the study and records its outcome in status.json."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import semisam_core
from semisam_core.errors import ConfigError, SemiSAMError
from semisam_core.files import read_json_lines, write_json
from semisam_core.plan import Plan, load_plan
from server.events import Narrator
from server.mlflow_log import mlflow_loggers
from server.patient_grid import PatientGrid
from server.run_folder import RunFolder
from server.run_log import RunLog
from server.study import Study
from server.superlink_watch import SUPERLINK, SuperLinkWatch
from server.tensorboard_log import TensorBoardLogger

logger = logging.getLogger("flwr")  # what `flwr run --stream` shows

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study to its end.

    Run config: ``plan`` (path of the plan), ``sites`` (simulation: folder of site files), ``num-sites`` (how many to
    wait for; 0 counts the files), ``run-folder`` (where the record goes; if empty, a new one under ``runs/``).

    Raises:
        SemiSAMError: the run cannot start or continue; the reason is in the run folder's status.json as well.
    """
    config = context.run_config
    plan_path = str(config.get("plan", ""))
    if not plan_path:
        raise ConfigError("the run config needs the key plan: the absolute path of the study plan.")
    plan = load_plan(Path(plan_path))
    folder = RunFolder(_run_path(str(config.get("run-folder", ""))))
    run = _run_name(folder, plan)
    folder.set_status("running", run=run)
    folder.listeners.append(_teller(folder))
    log = RunLog(folder, plan, [TensorBoardLogger(folder.path), *mlflow_loggers(folder.path, plan, run)])
    superlink = os.environ.get(SUPERLINK, "")
    with SuperLinkWatch(superlink, lambda why: folder.set_status("failed", why, run=run)) as watch:
        try:
            # Between hospitals uploads take time. In a simulation, pulling a reply is what makes the site work.
            sites = PatientGrid(grid) if superlink else grid
            Study(plan, sites, folder, run, _expected_sites(context)).execute()
        except BaseException as error:
            folder.set_status("failed", _reason(error, watch), run=run)
            log.end("failed")
            raise
    log.end("completed")
    folder.set_status("completed", run=run)
    logger.info("The study is complete; its record is in %s", folder.path)


def _teller(folder: RunFolder) -> Callable[[Mapping[str, Any]], None]:
    """Return a listener that writes what happens in a run into Flower's log, one line per event."""
    narrator = Narrator(read_json_lines(folder.metrics_path))

    def tell(event: Mapping[str, Any]) -> None:
        if (text := narrator.describe(event)) is not None:
            logger.info("%s", text)

    return tell


def _reason(error: BaseException, watch: SuperLinkWatch) -> str:
    if isinstance(error, SemiSAMError):
        return str(error)
    return watch.reason if watch.gone else f"{type(error).__name__}: {error}"


def _expected_sites(context: Context) -> int:
    number = int(context.run_config.get("num-sites", 0))
    if number > 0:
        return number
    folder = Path(str(context.run_config.get("sites", "")))
    files = [path for path in folder.iterdir() if path.suffix in {".yaml", ".yml"}] if folder.is_dir() else []
    if not files:
        raise ConfigError("the run config needs num-sites, or sites: a folder of site files.")
    return len(files)


def _run_path(given: str) -> Path:
    return Path(given) if given else Path.cwd() / "runs" / time.strftime("%Y%m%d-%H%M%S")


def _run_name(folder: RunFolder, plan: Plan) -> str:
    """Return the run's name, which it keeps across restarts.

    Raises:
        ConfigError: the folder holds a run of another plan.
    """
    path = folder.path / "run.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["plan_hash"] != plan.hash:
            raise ConfigError(f"{path}: this folder holds a run of another plan; use another folder, or the same plan.")
        return str(kept["run"])
    run = f"{plan.task.name[:40]}-{secrets.token_hex(4)}"
    about = {"run": run, "plan_hash": plan.hash, "versions": _versions()}
    write_json(path, about | {"plan": json.loads(plan.canonical_json())})
    return run


def _versions() -> dict[str, str]:
    """Return the versions that a person needs to repeat the run."""
    found = {name: importlib.metadata.version(name) for name in ("flwr", "torch", "monai", "numpy")}
    return {"fedsemisam": semisam_core.__version__, "python": platform.python_version(), **found}
