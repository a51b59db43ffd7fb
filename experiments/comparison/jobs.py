"""The runs of a comparison: what each one is, its state and how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.run_state import run_state
from experiments.comparison.arms import AnyArm, Arm, OracleArm, Who
from experiments.comparison.cohorts import Cohort
from semisam_core.files import write_json
from semisam_core.plan import Plan, write_plan
from semisam_core.reporting.bootstrap import CaseKey


@dataclass(frozen=True, eq=False)
class Job:
    """One run of one arm with one label count and seed; for an `alone` arm, at one site.

    Attributes:
        arm: the arm.
        cohort: the sites; an oracle takes those of the first label count, since it trains on none.
        seed: the seed, None for an oracle.
        site: the only site that takes part, None for all.
        folder: the run folder.
    """

    arm: AnyArm
    cohort: Cohort
    seed: int | None
    site: str | None
    folder: Path

    @property
    def title(self) -> str:
        """The name in progress and reports."""
        parts = [self.arm.name]
        if isinstance(self.arm, Arm):
            parts += [f"labels {self.cohort.setting}", f"seed {self.seed}"]
        return ", ".join([*parts, *([self.site] if self.site is not None else [])])

    @property
    def plan_path(self) -> Path:
        """The file of the plan it follows."""
        return self.folder / "plan.yaml"

    @property
    def pooled(self) -> bool:
        """Whether it trains on all sites' data in one place."""
        return isinstance(self.arm, Arm) and self.arm.who is Who.POOLED

    @property
    def sites(self) -> Path:
        """The folder of its site files."""
        return self.cohort.pooled_sites if self.pooled else self.cohort.sites

    @property
    def storages(self) -> Mapping[str, Path]:
        """Storage folder of each site that takes part."""
        if self.pooled:
            return {"pooled": self.cohort.pooled_storage}
        return {site: path for site, path in self.cohort.storages.items() if self.site in (None, site)}

    @property
    def training_labels(self) -> dict[str, tuple[str, ...]]:
        """The cases whose labels this run trains on, by site."""
        if isinstance(self.arm, OracleArm):
            return {}
        return {site: cases for site, cases in self.cohort.labeled.items() if self.site in (None, site)}

    @property
    def state(self) -> str:
        """Not started, running, failed or completed."""
        return run_state(self.folder)

    def origin(self, site: str, case: str) -> CaseKey:
        """Return the original site and case of a site and case of this run."""
        return self.cohort.origin[case] if self.pooled else (site, case)

    def write_plan(self, plan: Plan) -> None:
        """Write the plan this run follows."""
        write_plan(self.plan_path, self.arm.plan(plan, self.seed or 0) if isinstance(self.arm, Arm) else plan)

    def seconds(self) -> float:
        """Return how long it has run so far, over all attempts."""
        try:
            return float(json.loads((self.folder / "seconds.json").read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError):
            return 0.0

    def add_seconds(self, seconds: float) -> None:
        """Add the duration of an attempt."""
        write_json(self.folder / "seconds.json", {"seconds": self.seconds() + seconds})


def list_jobs(
    out: Path, arms: Sequence[Arm], oracles: Sequence[OracleArm], cohorts: Sequence[Cohort], seeds: Sequence[int]
) -> list[Job]:
    """Return all runs by label count, arm, seed and site; oracles first, since they are short.

    An `alone` arm has one run per site with a labeled case; without any, a site alone has nothing to learn from.
    """
    jobs = [Job(arm, cohorts[0], None, None, out / "arms" / arm.name) for arm in oracles]
    for cohort in cohorts:
        for arm in arms:
            for seed in seeds:
                place = out / "arms" / arm.name / cohort.sites.parent.name / f"seed-{seed}"
                if arm.who is Who.ALONE:
                    alone = [site for site in sorted(cohort.labeled) if cohort.labeled[site]]
                    jobs += [Job(arm, cohort, seed, site, place / site) for site in alone]
                else:
                    jobs.append(Job(arm, cohort, seed, None, place))
    return jobs


def seconds_left(jobs: Iterable[Job]) -> float | None:
    """Estimate how long unfinished runs will take, from finished runs of the same arm, or else of any arm that trains.

    Returns:
        Seconds, or None until a similar run has finished.
    """
    jobs = list(jobs)
    finished = [(job, job.seconds()) for job in jobs if job.state == "completed"]
    total = 0.0
    for job in jobs:
        if job.state == "completed":
            continue
        same = [seconds for other, seconds in finished if other.arm == job.arm]
        similar = same or [
            seconds for other, seconds in finished if isinstance(other.arm, Arm) is isinstance(job.arm, Arm)
        ]
        if not similar:
            return None
        total += max(0.0, sum(similar) / len(similar) - job.seconds())
    return total
