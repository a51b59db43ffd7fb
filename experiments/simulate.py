"""Run a whole study on this machine: local baselines, the federated run, the report."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
from reports.lead.intervals import write_intervals
from reports.lead.report import tell_of_report
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines, write_json
from semisam_core.paths import absolute_path, new_folder
from semisam_core.plan import Plan, write_plan

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
        assignments: list[str],
        engine: str,
        local_baseline: bool,
        console: Console,
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
        study = check_study(plan, sites, assignments)
        if out is None:
            out = Path("runs") / f"{study.plan.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if resume is None:
            out = new_folder(out, "--out", "choose another, or resume the run in it with --resume")
        simulation = cls(study, absolute_path(sites, "--sites"), out, engine, local_baseline, console)
        if resume is None:
            simulation._write_settings()
        return simulation

    def execute(self) -> bool:
        """Run whatever has not finished, write and print the report; return whether the study completed."""
        self.console.print(study_table(self.study))
        self.console.print(f"Run folder: {self.out}", highlight=False, markup=False, soft_wrap=True)
        if self.local_baseline:
            self._run_local_arms()
        completed = self._run_federated()
        self._report()
        return completed

    def _run_local_arms(self) -> None:
        plan_path = self.out / "local" / "plan.yaml"
        write_plan(plan_path, supervised_alone(self.study.plan))
        for config, found in self.study.sites:
            folder = self.out / "local" / config.site
            if not found.of(Role.LABELED) or run_state(folder) == "completed":
                continue
            command = self._child_command(plan_path, folder, config.site)
            title = f"{config.site} alone"
            with (
                ProcessTree() as tree,
                RunMonitor(title, folder, {config.site: config.storage.folder}, self.console) as monitor,
            ):
                self._wait(tree, command, self.out / "local" / f"{config.site}.log", monitor)
            if run_state(folder) != "completed":
                self.console.print(f"  {title} did not complete: {run_reason(folder)}", highlight=False, markup=False)

    def _run_federated(self) -> bool:
        if run_state(self.out) == "completed":
            return True
        storages = {config.site: config.storage.folder for config, _ in self.study.sites}
        with RunMonitor("federated", self.out, storages, self.console) as monitor:
            if self.engine == "in-process":
                with ProcessTree() as tree:
                    command = self._child_command(self.out / "plan.yaml", self.out, None)
                    self._wait(tree, command, self.out / "log" / "in-process.log", monitor)
            else:
                self._run_flower(monitor)
        state = run_state(self.out)
        if state != "completed":
            self.console.print(f"The study did not complete ({state}): {run_reason(self.out)}", markup=False)
        return state == "completed"

    def _run_flower(self, monitor: RunMonitor) -> None:
        import torch

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
            on_tick=monitor.tick,
            settled=lambda: settled(self.out),
            max_seconds=longest(self.study.plan),
        )
        if outcome.status != "completed":
            self.console.print(
                f"Flower: the run is {outcome.status}. {outcome.details} Log: {outcome.log}", markup=False
            )
            record_end(self.out, outcome.status, outcome.details)

    def _child_command(self, plan: Path, folder: Path, only: str | None) -> list[str]:
        command = [sys.executable, "-m", "cli.main", "run-in-process"]
        command += ["--plan", str(plan), "--sites", str(self.sites), "--run-folder", str(folder)]
        return command + (["--only", only] if only is not None else [])

    @staticmethod
    def _wait(tree: ProcessTree, command: list[str], log: Path, monitor: RunMonitor) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = tree.start(command, stdout=file, stderr=file)
            while process.poll() is None:
                monitor.tick()
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


def supervised_alone(plan: Plan) -> Plan:
    """Return the plan of the local baseline: supervised, with the same steps and seed, for one site."""
    return plan.alone().model_copy(
        update={
            "regularizer": plan.regularizer.model_copy(update={"name": "none"}),
            "pseudo_labels": None,
        }
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = yaml.safe_load((folder / "simulation.json").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        raise ConfigError(f"--resume {folder}: this is not a run folder of `semisam simulate`.") from None
    return content
