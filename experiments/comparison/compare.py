"""Compare ways to train with one plan: run every arm, score it case by case, report means with intervals."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from client.site_config import usable_generalists
from engines.run_state import run_reason
from experiments.checks import CheckedStudy, check_study, study_table
from experiments.comparison.arms import Who, arm_of, oracle_arms, oracle_omissions
from experiments.comparison.cohorts import fingerprint, lend_storage, narrowed, write_cohort
from experiments.comparison.definition import Definition, define
from experiments.comparison.jobs import Job, list_jobs, seconds_left
from experiments.comparison.report import Report
from experiments.comparison.results import gather
from experiments.comparison.runner import Runner
from experiments.comparison.scores import collect_scores
from experiments.comparison.unlabeled import HiddenScore, unlabeled_scores
from semisam_core.configuration import read_yaml
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically, write_json
from semisam_core.paths import absolute_path, new_folder
from semisam_core.plan import write_plan

RECORD, DEFINITION = "comparison.json", "comparison.yaml"


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    Attributes:
        plan: the study plan.
        sites: folder of site files.
        out: the comparison's folder.
        assignments: overrides of the plan.
        file: the definition; None takes that of the resumed comparison, or the plan's defaults for a new one.
        changes: keys of the definition given as options; they override those of the file.
        resume: whether the folder holds a comparison to resume.
    """

    plan: Path
    sites: Path
    out: Path
    assignments: list[str]
    file: Path | None
    changes: dict[str, Any]
    resume: bool


@dataclass
class Comparison:
    """One comparison, checked and ready to run.

    Attributes:
        study: the checked plan and sites.
        definition: what is compared.
        jobs: its runs, in order.
        omissions: why generalists have no oracle.
        out: the comparison's folder.
        console: where progress and the report are printed.
    """

    study: CheckedStudy
    definition: Definition
    jobs: list[Job]
    omissions: tuple[str, ...]
    out: Path
    console: Console

    @classmethod
    def prepare(cls, request: Request, console: Console) -> Comparison:
        """Check everything that can be checked without reading a scan, and create or reopen the folder.

        Raises:
            ConfigError: option or key, value and what is accepted.
        """
        study = check_study(request.plan, request.sites, request.assignments)
        out = absolute_path(request.out, "--out")
        identity = {"plan_hash": study.plan.hash, "sites": fingerprint(study.sites)}
        if request.resume:
            _check_same(out, identity)
        definition = _definition(request, study, out)
        arms = [arm_of(name, study.plan) for name in definition.arms]
        settings = [(each, narrowed(study.sites, each, study.plan)) for each in definition.labeled]
        pooled = any(arm.who is Who.POOLED for arm in arms)
        if not request.resume:
            new_folder(out, "--out", "choose another, or add --resume to resume the comparison in it")
        cohorts = [write_cohort(out, each, sites, pooled) for each, sites in settings]
        available = frozenset(
            name
            for config, found in study.sites
            if found.of(Role.VALIDATION)
            for name in usable_generalists(config, study.plan)
        )
        oracles = oracle_arms(study.plan, available) if definition.oracles else ()
        omissions = oracle_omissions(study.plan, available) if definition.oracles else ()
        jobs = list_jobs(out, arms, oracles, cohorts, definition.seeds)
        write_plan(out / "plan.yaml", study.plan)
        content = yaml.safe_dump(definition.model_dump(mode="json"), sort_keys=False)
        write_atomically(out / DEFINITION, content.encode())
        write_json(out / RECORD, identity)
        return cls(study, definition, jobs, omissions, out, console)

    def execute(self, runner: Runner) -> bool:
        """Run whatever has not finished, write and print the report; return whether every run completed.

        A run that fails is reported and left out of the figures; the others still run.

        Args:
            runner: runs one job until it completes or fails.
        """
        self.console.print(study_table(self.study))
        self._say(f"Comparison folder: {self.out}")
        for number, job in enumerate(self.jobs, start=1):
            if job.state != "completed":
                self._say(f"[{number}/{len(self.jobs)}] {job.title}; {_time_left(self.jobs)}")
                self._run(job, runner)
        finished = {job: collect_scores(job) for job in self.jobs if job.state == "completed"}
        hidden = {job: self._unlabeled(job) for job in finished}
        results = gather(self.jobs, finished, self.study.plan.class_names, self.definition.baseline, hidden)
        report = Report(self.study.plan, self.definition, results, self.omissions)
        report.write(self.out)
        report.show(self.console)
        self._say(f"Everything is in {self.out}")
        return len(finished) == len(self.jobs)

    def _run(self, job: Job, runner: Runner) -> None:
        job.write_plan(self.study.plan)
        if job.pooled:
            lend_storage(job.cohort)
        began = time.monotonic()
        try:
            runner(job)
        finally:
            job.add_seconds(time.monotonic() - began)
        if job.state != "completed":
            self._say(f"  {job.title} did not complete ({job.state}): {run_reason(job.folder)}")

    def _unlabeled(self, job: Job) -> tuple[HiddenScore, ...]:
        with Progress(console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            task = progress.add_task(f"scoring unlabeled scans: {job.title}", total=None)
            return unlabeled_scores(job, lambda done, total: progress.update(task, completed=done, total=total))

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def definition_changes(
    arms: str | None,
    baseline: str | None,
    seeds: str | None,
    labeled: list[str] | None,
    oracles: bool | None,
    engine: str,
) -> dict[str, Any]:
    """Return the keys of the definition that were given as options.

    Raises:
        ConfigError: a seed is not a number, or the engine is not available here.
    """
    if engine != "in-process":
        raise ConfigError(
            f"--engine {engine}: accepted: in-process. Flower's simulation gives the same weights and takes longer."
        )
    changes: dict[str, Any] = {"baseline": baseline, "labeled": labeled or None, "oracles": oracles}
    changes["arms"] = None if arms is None else [name.strip() for name in arms.split(",")]
    if seeds is not None:
        parts = [part.strip() for part in seeds.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(f"--seeds {seeds}: expected numbers separated by commas, for example 0,1,2.")
        changes["seeds"] = [int(part) for part in parts]
    return {key: value for key, value in changes.items() if value is not None}


def _definition(request: Request, study: CheckedStudy, out: Path) -> Definition:
    file = request.file
    if file is None and request.resume:
        file = out / DEFINITION
    content = read_yaml(file) if file is not None else {}
    return define(content | request.changes, study.plan, str(file) if file is not None else "comparison")


def _check_same(out: Path, identity: dict[str, str]) -> None:
    try:
        kept = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"--resume: {out} is not a folder of `semisam compare`.") from None
    if kept.get("plan_hash") != identity["plan_hash"]:
        raise ConfigError(
            f"--resume: {out} compares with another plan (hash {str(kept.get('plan_hash'))[:12]}, now "
            f"{identity['plan_hash'][:12]}). Give the same plan and --set, or a new --out."
        )
    if kept.get("sites") != identity["sites"]:
        raise ConfigError(
            f"--resume: the site files or the cases they find have changed since {out} was created, so its finished "
            "arms could not be compared with new ones. Restore them, or give a new --out."
        )


def _time_left(jobs: list[Job]) -> str:
    seconds = seconds_left(jobs)
    return "time left not known yet" if seconds is None else f"about {seconds / 60:.1f} min left"
