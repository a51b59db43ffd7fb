"""Submit a run of the study, follow it and report truthfully how it ended; resume one that was interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from deployment.invitation import sha256
from deployment.lead.service import alone, control_of, find, log_file
from deployment.lead.study_folder import LeadError, StudyFolder
from deployment.lead.update_size import write_update_size
from engines.flower_control import FlowerControl, FlowerError, FlowerRun
from engines.monitor import RunMonitor
from engines.processes import ProcessTree
from engines.results import as_json, collect, results_table
from engines.run_state import COMPLETED, longest, record_end, run_reason, run_state, settled
from reports.lead.report import tell_of_report
from semisam_core.configuration import StrictModel, parse, read_yaml
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines, write_atomically, write_json
from semisam_core.plan import Plan, load_plan
from server.mlflow_log import ask_for_mlflow, usable_folder

TICK_S = 0.5
ASK_EVERY_S = 10.0
UNREACHABLE_S = 180.0
SERVER_APP_GONE_S = 30.0
KILLED_S = 5.0
RECORD = "lead.json"
LEFT = (
    "No longer following; the run continues. `semisam lead run --resume` follows it again, `semisam lead stop --run` "
    "stops it."
)


class RunRecord(StrictModel):
    """What the lead records about a run, beside the server's own record.

    Attributes:
        created: when it was first submitted, in seconds since 1970.
        sites: how many sites it waits for.
        code_hash: SHA-256 of the code that was last submitted.
    """

    created: float
    sites: int
    code_hash: str

    @classmethod
    def of(cls, folder: Path) -> RunRecord:
        """Read a run folder's record.

        Raises:
            ConfigError: the folder has none.
        """
        return parse(cls, read_yaml(folder / RECORD), str(folder / RECORD))

    def write(self, folder: Path) -> None:
        """Write the record into a run folder."""
        write_json(folder / RECORD, self.model_dump())


@dataclass(frozen=True)
class LeadRun:
    """A run that was submitted to Flower.

    Attributes:
        study: the study it belongs to.
        folder: its run folder.
        run_id: Flower's number for it.
        plan: the plan that it was started with.
    """

    study: StudyFolder
    folder: Path
    run_id: int
    plan: Plan

    def follow(self, control: FlowerControl, console: Console) -> bool | None:
        """Show the run until it ends and write its report; return whether it completed.

        After Ctrl-C the run goes on without being followed; then return None.

        Raises:
            LeadError: the SuperLink ended before the run did, or the run took longer than all its deadlines.
            FlowerError: the SuperLink can no longer be reached.
        """
        console.print(f"Run folder: {self.folder}", highlight=False, markup=False, soft_wrap=True)
        try:
            with RunMonitor(self.study.settings.name, self.folder, {}, console) as monitor:
                run = self._wait(control, monitor.tick)
        except KeyboardInterrupt:
            console.print(LEFT, highlight=False, markup=False, soft_wrap=True)
            return None
        end = run.end or "unknown"
        record_end(self.folder, end, run.details)
        self._report(console)
        completed = end == COMPLETED and run_state(self.folder) == COMPLETED
        if not completed:
            console.print(f"The run did not complete: {run_reason(self.folder)}", highlight=False, markup=False)
        return completed

    def _wait(self, control: FlowerControl, on_tick: Callable[[], None]) -> FlowerRun:
        deadline = time.monotonic() + longest(self.plan)
        asked, answered = time.monotonic(), time.monotonic()
        while time.monotonic() < deadline:
            on_tick()
            if find(self.study) is None:
                raise LeadError(
                    f"the SuperLink ended before the run did; its log is {log_file(self.study)}. Finished rounds are "
                    "kept: `semisam lead start`, then `semisam lead run --resume` continues."
                )
            if settled(self.folder) or time.monotonic() - asked > ASK_EVERY_S:
                try:
                    if (run := control.run(self.run_id)).finished:
                        return run
                    answered = time.monotonic()
                except FlowerError:
                    if time.monotonic() - answered > UNREACHABLE_S:
                        raise
                asked = time.monotonic()
            time.sleep(TICK_S)
        control.stop(self.run_id)
        raise LeadError("the run took longer than all its deadlines together, and was stopped.")

    def _report(self, console: Console) -> None:
        lines = read_json_lines(self.folder / "metrics.jsonl")
        selected = [line for line in lines if line["event"] == "selected"]
        chosen_by = selected[-1]["by"] if selected else "nothing, the study did not finish"
        results = collect(self.folder, {}, self.plan.class_names)
        write_json(self.folder / "results.json", {"plan_hash": self.plan.hash, "sites": as_json(results)})
        if results:
            console.print(results_table(results, f"{self.plan.task.name}, {self.folder.name}", chosen_by))
        tell_of_report(self.folder, console)


def submitted_run(
    study: StudyFolder,
    control: FlowerControl,
    resume: bool,
    sites: int | None,
    console: Console,
    mlflow: Path | None,
) -> LeadRun:
    """Submit a new run, or resume one; see `new_run` and `resumed_run`."""
    if resume:
        return resumed_run(study, control, sites, console, mlflow)
    return new_run(study, control, sites, mlflow)


def new_run(study: StudyFolder, control: FlowerControl, sites: int | None, mlflow: Path | None = None) -> LeadRun:
    """Submit a new run of the study's plan.

    Args:
        study: the study.
        control: its SuperLink.
        sites: how many sites to wait for; the study's own number by default.
        mlflow: MLflow's folder, if the run is to be logged there as well.

    Raises:
        ConfigError: the plan is invalid, or the run cannot be logged to MLflow.
        LeadError: a run is in progress or being submitted.
        FlowerError: the SuperLink did not accept it.
    """
    with _submitting(study):
        return _new_run(study, control, sites, mlflow)


def _new_run(study: StudyFolder, control: FlowerControl, sites: int | None, mlflow: Path | None) -> LeadRun:
    if active := control.unfinished_runs():
        raise LeadError(
            f"a run is in progress: {active[-1].config.get('run-folder')}. `semisam lead run --resume` follows it, "
            "`semisam lead stop --run` stops it."
        )
    plan = study.plan()
    store = None if mlflow is None else usable_folder(mlflow)
    began = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(began))
    folder = study.runs / f"{plan.task.name}-{stamp}"
    folder.mkdir(parents=True)
    write_atomically(folder / "plan.yaml", study.plan_path.read_bytes())
    record = RunRecord(created=began, sites=sites or study.settings.sites, code_hash=sha256(study.code()))
    return _submit(study, control, folder, plan, record, store)


def resumed_run(
    study: StudyFolder, control: FlowerControl, sites: int | None, console: Console, mlflow: Path | None = None
) -> LeadRun:
    """Return the run in progress, or resubmit the last run if it did not complete.

    Args:
        study: the study.
        control: its SuperLink.
        sites: how many sites to wait for; as many as before by default.
        console: where to say what is done.
        mlflow: MLflow's folder, if the run is to be logged there from now on; as before by default.

    Raises:
        LeadError: there is no such run, a run is being submitted, or one is in progress, too late to log it to MLflow.
        ConfigError: the run cannot be logged to MLflow.
        FlowerError: the SuperLink cannot be reached, or did not accept it.
    """
    with _submitting(study):
        return _resumed_run(study, control, sites, console, mlflow)


def _resumed_run(
    study: StudyFolder, control: FlowerControl, sites: int | None, console: Console, mlflow: Path | None
) -> LeadRun:
    if active := control.unfinished_runs():
        run = active[-1]
        folder = Path(str(run.config.get("run-folder", "")))
        if folder.parent != study.runs or not (folder / "plan.yaml").exists():
            raise LeadError(f"a run of another study is in progress: {folder}. `semisam lead stop --run` stops it.")
        if mlflow is not None:
            raise LeadError("--mlflow counts when a run is submitted, and this one is in progress; omit it to follow.")
        console.print("The run is in progress; following it.")
        return LeadRun(study, folder, run.run_id, load_plan(folder / "plan.yaml"))
    last = last_run(study)
    if last is None or run_state(last) == COMPLETED:
        raise LeadError("no run was interrupted; `semisam lead run` starts a new one.")
    store = None if mlflow is None else usable_folder(mlflow)
    kept, code_hash = RunRecord.of(last), sha256(study.code())
    if kept.code_hash != code_hash:
        console.print("The study's code has changed since this run started; it resumes with the new code.")
    record = RunRecord(created=kept.created, sites=sites or kept.sites, code_hash=code_hash)
    return _submit(study, control, last, load_plan(last / "plan.yaml"), record, store)


def last_run(study: StudyFolder) -> Path | None:
    """Return the folder of the run that was started last."""
    started: list[tuple[float, Path]] = []
    for path in study.runs.glob(f"*/{RECORD}"):
        try:
            started.append((RunRecord.of(path.parent).created, path.parent))
        except ConfigError:
            continue
    return max(started)[1] if started else None


def stop_runs(study: StudyFolder) -> list[Path]:
    """Stop all runs in progress and wait until their ServerApps have ended; return their folders.

    Raises:
        LeadError: the SuperLink is not running, or a ServerApp could not be stopped.
    """
    with control_of(study) as control:
        active = control.unfinished_runs()
        for run in active:
            control.stop(run.run_id)
    _wait_for_server_app(study)
    folders = [Path(str(run.config.get("run-folder", ""))) for run in active]
    for folder in folders:
        if folder.is_dir():
            record_end(folder, "stopped", "by `semisam lead stop --run`.")
    return folders


def _submitting(study: StudyFolder) -> contextlib.AbstractContextManager[None]:
    """Let only one command at a time look for a run in progress and submit one: a run folder has a single writer."""
    return alone(study, "submitting", "submitting a run")


def _submit(
    study: StudyFolder, control: FlowerControl, folder: Path, plan: Plan, record: RunRecord, store: Path | None
) -> LeadRun:
    _wait_for_server_app(study)  # a run folder has a single writer
    record.write(folder)
    if store is not None:
        ask_for_mlflow(folder, store, study.settings.name, record.code_hash)
    write_update_size(study.update_size, plan, study.settings.uploads.factor)
    (folder / "status.json").unlink(missing_ok=True)  # it says how the run ended last time
    config: dict[str, str | int] = {
        "plan": str(folder / "plan.yaml"),
        "num-sites": record.sites,
        "run-folder": str(folder),
    }
    return LeadRun(study, folder, control.submit(study.code(), config), plan)


def _wait_for_server_app(study: StudyFolder) -> None:
    """Wait for an earlier run's ServerApp to end; kill it if it does not.

    Raises:
        LeadError: it cannot be killed, or the SuperLink is not running.
    """
    service = find(study)
    if service is None:
        raise LeadError("the SuperLink has ended; `semisam lead start` starts it.")
    tree = ProcessTree(service.mark)
    for wait_s, kill in ((SERVER_APP_GONE_S, False), (KILLED_S, True)):
        deadline = time.monotonic() + wait_s
        while working := [process for process in tree.alive() if _is_server_app(process)]:
            if time.monotonic() > deadline:
                break
            if kill:
                for process in working:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            time.sleep(TICK_S)
        else:
            return
    raise LeadError("an earlier run's ServerApp does not end; `semisam lead stop`, then `semisam lead start`.")


def _is_server_app(process: psutil.Process) -> bool:
    """Return whether this is a live ServerApp process (not a zombie)."""
    try:
        named = any("flwr-serverapp" in part for part in process.cmdline())
        return named and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
