"""Run a whole study on this machine: local baselines, the federated run, the report."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from engines.bundle import build_bundle
from engines.monitor import RunMonitor
from engines.processes import ProcessTree
from engines.results import SiteResult, as_json, collect, results_table
from engines.run_state import longest, record_end, run_name, run_reason, run_state, settled
from engines.simulation import run_flower
from experiments.checks import CheckedStudy, check_study, study_table
from experiments.intervals import case_intervals
from experiments.local_arms import LocalArms
from reports.lead.intervals import write_intervals
from reports.lead.report import tell_of_report
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines, write_json
from semisam_core.paths import absolute_path, new_folder
from semisam_core.plan import write_plan
from server.mlflow_log import ask_for_mlflow, mlflow_loggers, usable_folder
from server.run_folder import RunFolder
from server.run_log import RunLog

ENGINES = ("flower", "in-process")
POLL_S = 0.4


@dataclass
class Simulation:
    """One simulated study, checked and ready to run.

    Attributes:
        study: the checked plan and sites.
        sites: folder of site files.
        out: the run folder.
        engine: `flower` or `in-process`.
        local_baseline: whether each labeled site is also trained alone, supervised.
        console: where progress and results are printed.
    """

    study: CheckedStudy
    sites: Path
    out: Path
    engine: str
    local_baseline: bool
    console: Console

    @classmethod
    def prepare(
        cls,
        plan: Path | None,
        sites: Path | None,
        out: Path | None,
        resume: Path | None,
        assignments: list[str] | None,
        engine: str,
        local_baseline: bool,
        console: Console,
        mlflow: Path | None = None,
    ) -> Simulation:
        """Check everything that can be checked without reading a scan, and create or reopen the run folder.

        Raises:
            ConfigError: option, value and what is accepted.
        """
        if engine not in ENGINES:
            raise ConfigError(f"--engine {engine}: accepted: {', '.join(ENGINES)}.")
        if resume is not None:
            if plan or sites or out or assignments:
                raise ConfigError(
                    "--resume takes plan, sites and folder from the run; omit --plan, --sites, --out and --set."
                )
            resume = absolute_path(resume, "--resume")
            kept = _read_settings(resume)
            plan, sites, out = resume / "plan.yaml", Path(kept["sites"]), resume
            engine, local_baseline = kept["engine"], kept["local_baseline"]
        elif plan is None or sites is None:
            raise ConfigError("--plan and --sites are required (or --resume with a run folder).")
        study = check_study(plan, sites, assignments or [])
        store = None if mlflow is None else usable_folder(mlflow)
        if out is None:
            out = Path("runs") / f"{study.plan.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if resume is None:
            out = new_folder(out, "--out", "choose another, or resume the run in it with --resume")
        simulation = cls(study, absolute_path(sites, "--sites"), out, engine, local_baseline, console)
        if resume is None:
            simulation._write_settings()
        if store is not None:
            code_hash = hashlib.sha256(build_bundle()).hexdigest()
            ask_for_mlflow(out, store, study.plan.task.name, code_hash)
        return simulation

    def execute(self) -> bool:
        """Run whatever has not finished, write and print the report; return whether the study completed."""
        self.console.print(study_table(self.study))
        self.console.print(f"Run folder: {self.out}", highlight=False, markup=False, soft_wrap=True)
        with self._local_arms() as arms:
            if torch.cuda.is_available():
                arms.finish()  # first, since a GPU's memory may not hold two trainings
            completed = self._run_federated(arms)
            arms.finish()
        self._report()
        return completed

    def _local_arms(self) -> LocalArms:
        labeled = [config for config, found in self.study.sites if found.of(Role.LABELED)]
        folder = self.out / "local"
        return LocalArms(self.study.plan, self.sites, folder, labeled if self.local_baseline else (), self.console)

    def _run_federated(self, arms: LocalArms) -> bool:
        if run_state(self.out) == "completed":
            # Its server is gone; a log in MLflow that is asked for only now is written here.
            loggers = mlflow_loggers(self.out, self.study.plan, run_name(self.out))
            RunLog(RunFolder(self.out), self.study.plan, loggers).end("completed")
            return True
        storages = {config.site: config.storage.folder for config, _ in self.study.sites}
        with RunMonitor("federated", self.out, storages, self.console) as monitor:

            def tick() -> None:
                monitor.tick()
                arms.advance()

            if self.engine == "in-process":
                self._run_in_process(tick)
            else:
                self._run_flower(tick)
        state = run_state(self.out)
        if state != "completed":
            self.console.print(f"The study did not complete ({state}): {run_reason(self.out)}", markup=False)
        return state == "completed"

    def _run_flower(self, tick: Callable[[], None]) -> None:
        sites = len(self.study.sites)
        run_config: dict[str, str | int] = {
            "plan": str(self.out / "plan.yaml"),
            "sites": str(self.sites),
            "num-sites": sites,
            "run-folder": str(self.out),
        }
        gpus = min(1.0, torch.cuda.device_count() / sites) if torch.cuda.is_available() else 0.0
        threads = [config.threads for config, _ in self.study.sites]
        outcome = run_flower(
            build_bundle(),
            run_config,
            num_sites=sites,
            cpus_per_site=max((t for t in threads if t), default=1),
            gpus_per_site=gpus,
            work=self.out / "log",
            on_tick=tick,
            settled=lambda: settled(self.out),
            max_seconds=longest(self.study.plan),
        )
        if outcome.status != "completed":
            self.console.print(
                f"Flower: the run is {outcome.status}. {outcome.details} Log: {outcome.log}", markup=False
            )
            record_end(self.out, outcome.status, outcome.details)

    def _run_in_process(self, tick: Callable[[], None]) -> None:
        command = [sys.executable, "-m", "cli.main", "run-in-process", "--plan", str(self.out / "plan.yaml")]
        command += ["--sites", str(self.sites), "--run-folder", str(self.out)]
        log = self.out / "log" / "in-process.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with ProcessTree() as tree, log.open("ab") as file:
            process = tree.start(command, stdout=file, stderr=file)
            while process.poll() is None:
                tick()
                time.sleep(POLL_S)

    def _report(self) -> None:
        plan = self.study.plan
        pictures = self.out / "pictures"
        run = run_name(self.out)
        for config, _ in self.study.sites:
            source = config.storage.folder / "runs" / run / "overview.png"
            if source.exists():
                pictures.mkdir(exist_ok=True)
                shutil.copyfile(source, pictures / f"{config.site}.png")
        local = {config.site: self.out / "local" / config.site for config, _ in self.study.sites}
        results = collect(self.out, local, plan.class_names)
        selected = [line for line in read_json_lines(self.out / "metrics.jsonl") if line["event"] == "selected"]
        chosen_by = selected[-1]["by"] if selected else "nothing, the study did not finish"
        results = self._with_unlabeled(results, run)
        write_json(self.out / "results.json", {"plan_hash": plan.hash, "sites": as_json(results)})
        if results:
            self.console.print(results_table(results, f"{plan.task.name}, {self.out.name}", chosen_by))
        self.console.print(f"Everything is in {self.out}", highlight=False, markup=False, soft_wrap=True)
        configs = [config for config, _ in self.study.sites]
        write_intervals(self.out, case_intervals(configs, self.out, local, plan.class_names))
        tell_of_report(self.out, self.console)

    def _with_unlabeled(self, results: list[SiteResult], run: str) -> list[SiteResult]:
        """Add scores on scans that the study used as unlabeled, where labels are at hand; also kept scan by scan."""
        if run_state(self.out) != "completed":
            return results
        from experiments.unlabeled import mean_scores, score_unlabeled

        with Progress(console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            task = progress.add_task("scoring unlabeled scans", total=None)
            scores = score_unlabeled(
                self.study.plan,
                [config for config, _ in self.study.sites],
                self.out,
                run,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        if not scores:
            return results
        write_json(self.out / "unlabeled.json", [asdict(each) for each in scores])
        found = []
        for result in results:
            means = mean_scores([s for s in scores if (s.site, s.target) == (result.site, result.target)])
            found.append(
                replace(
                    result,
                    unlabeled_scored=means.scans,
                    prompting_dice=means.prompting,
                    pseudo_label_dice=means.pseudo_label,
                    unlabeled_dice=means.final,
                )
            )
        return found

    def _write_settings(self) -> None:
        write_plan(self.out / "plan.yaml", self.study.plan)
        write_json(
            self.out / "simulation.json",
            {"sites": str(self.sites), "engine": self.engine, "local_baseline": self.local_baseline},
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = yaml.safe_load((folder / "simulation.json").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        raise ConfigError(f"--resume {folder}: this is not a run folder of `semisam simulate`.") from None
    return content
