"""The scalars of a run for MLflow: a database and artifacts in a local folder, without a server or a network."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semisam_core.configuration import StrictModel, parse, read_yaml
from semisam_core.errors import ConfigError
from semisam_core.files import write_json
from semisam_core.paths import writable_folder
from semisam_core.plan import Plan
from server.scalars import RoundScalars

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)
REQUEST = "mlflow.json"
DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
RUN_TAG = "semisam.run"
PACKAGES = ("mlflow", "alembic", "sqlalchemy")
# MLflow's own limits.
MOST_METRICS, MOST_PARAMETERS, LONGEST_PARAMETER = 1000, 100, 6000
IN_ADDRESSES = "?#%"
_END = {"completed": "FINISHED", "failed": "FAILED"}


class MlflowRequest(StrictModel):
    """`mlflow.json` in a run folder: that the run is to be logged to MLflow as well, and under which names.

    Attributes:
        folder: the absolute path of MLflow's folder.
        study: the study, which is MLflow's experiment.
        code_hash: SHA-256 of the code that the run was submitted with.
    """

    folder: str
    study: str
    code_hash: str


def usable_folder(folder: Path) -> Path:
    """Return the absolute path of MLflow's folder, which is made, if a run can be logged there; for before it starts.

    Raises:
        ConfigError: a package is missing, or the folder cannot be used.
    """
    if missing := [name for name in PACKAGES if not _installed(name)]:
        raise ConfigError(
            f"--mlflow: {missing[0]} is not installed here; install it with "
            "`pip install -c constraints.txt '.[mlflow]'`, or omit --mlflow."
        )
    if used := set(IN_ADDRESSES) & set(str(folder.absolute())):
        raise ConfigError(f"--mlflow {folder}: the path must not contain {' '.join(sorted(used))}.")
    return writable_folder(folder, "--mlflow")


def ask_for_mlflow(run_folder: Path, folder: Path, study: str, code_hash: str) -> None:
    """Ask the server of a run that is about to start for a log in MLflow.

    Args:
        run_folder: the run folder.
        folder: what `usable_folder` returned.
        study: the study's name.
        code_hash: SHA-256 of the code that is submitted.
    """
    asked = MlflowRequest(folder=str(folder), study=study, code_hash=code_hash)
    write_json(run_folder / REQUEST, asked.model_dump())


def mlflow_loggers(run_folder: Path, plan: Plan, run: str) -> list[MlflowLogger]:
    """Return the run's logger if it was asked for.

    Raises:
        ConfigError: the request cannot be read.
    """
    asked = _request(run_folder)
    return [] if asked is None else [MlflowLogger(run_folder, plan, run, asked)]


class MlflowLogger:
    """Writes one MLflow run: the plan as parameters, scalars as metrics by round, names and hashes as tags.

    Args:
        run_folder: the run folder.
        plan: the study plan.
        run: the run's name, the same after it was resumed.
        asked: where to, and under which names.
    """

    name = "MLflow"

    def __init__(self, run_folder: Path, plan: Plan, run: str, asked: MlflowRequest) -> None:
        self._run_folder, self._plan, self._run, self._asked = run_folder, plan, run, asked
        self._client: MlflowClient | None = None
        self._id = ""

    def begin(self) -> None:
        """Begin an MLflow run in place of an earlier one of the same run, whose tags, notes among them, it keeps.

        The earlier one is deleted as MLflow deletes runs: it can be restored until it is purged.
        """
        self._client = client = _open(Path(self._asked.folder))
        experiment = _experiment(client, self._asked)
        tags = {"mlflow.runName": self._run}
        for before in _runs(client, experiment, self._run):
            tags |= before.data.tags
            client.delete_run(before.info.run_id)
        tags |= {
            RUN_TAG: self._run,
            "semisam.study": self._asked.study,
            "semisam.plan-hash": self._plan.hash,
            "semisam.code-hash": self._asked.code_hash,
        }
        self._id = client.create_run(experiment, tags=tags).info.run_id
        for part in _parts(list(parameters(self._plan).items()), MOST_PARAMETERS):
            client.log_batch(self._id, params=[_parameter(name, value) for name, value in part])
        client.log_artifact(self._id, str(self._run_folder / "plan.yaml"))

    def log(self, steps: Iterable[RoundScalars]) -> None:
        """Write scalars as metrics, with their rounds as steps."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(1000 * step.time), step.round)
            for step in steps
            for name, value in step.values.items()
        ]
        for part in _parts(metrics, MOST_METRICS):
            self._opened().log_batch(self._id, metrics=part)

    def end(self, state: str) -> None:
        """Set the MLflow run's status."""
        self._opened().set_terminated(self._id, _END[state])

    def _opened(self) -> MlflowClient:
        assert self._client is not None, "begin comes first"
        return self._client


def keep_report(run_folder: Path, report: Path) -> None:
    """Add a run's report to its artifacts, if the run is logged to MLflow; a failure is a warning."""
    try:
        asked = _request(run_folder)
        if asked is None:
            return
        client, run = _open(Path(asked.folder)), json.loads((run_folder / "run.json").read_text())["run"]
        for each in _runs(client, _experiment(client, asked), run):
            client.log_artifact(each.info.run_id, str(report))
    except Exception as error:  # noqa: BLE001 (whatever another program's library raises)
        logger.warning("The report could not be added to MLflow: %s: %s", type(error).__name__, error)


def parameters(plan: Plan) -> dict[str, str]:
    """Return a plan as MLflow's parameters: dotted keys, each with its value as JSON."""
    found = dict(_flat("", plan.model_dump(mode="json")))
    return {key: json.dumps(value)[:LONGEST_PARAMETER] for key, value in found.items()}


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _flat(f"{key}.{name}" if key else str(name), each)
    else:
        yield key, value


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def _request(run_folder: Path) -> MlflowRequest | None:
    path = run_folder / REQUEST
    return parse(MlflowRequest, read_yaml(path), str(path)) if path.exists() else None


def _open(folder: Path) -> MlflowClient:
    # MLflow reports how it is used to its makers unless told not to; nothing here needs a network.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    folder.mkdir(parents=True, exist_ok=True)
    address = f"sqlite:///{folder / DATABASE}"
    return MlflowClient(tracking_uri=address, registry_uri=address)


def _experiment(client: MlflowClient, asked: MlflowRequest) -> str:
    found = client.get_experiment_by_name(asked.study)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(asked.study, (Path(asked.folder) / ARTIFACTS / asked.study).as_uri()))


def _runs(client: MlflowClient, experiment: str, run: str) -> list[Run]:
    return list(client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run}'"))


def _parameter(name: str, value: str) -> Any:
    from mlflow.entities import Param

    return Param(name, value)


def _parts(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), most):
        yield items[begin : begin + most]
