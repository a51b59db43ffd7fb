"""A tiny study to compare on, and a runner inside this process, where the fake generalist is registered."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from engines import in_process
from experiments.comparison import oracle
from experiments.comparison.arms import OracleArm
from experiments.comparison.compare import Comparison, Request
from experiments.comparison.jobs import Job
from semisam_core.errors import SemiSAMError
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]


def write_study(make_site: MakeSite, folder: Path, *assignments: str) -> tuple[Path, Path]:
    """Write a plan and two sites: alpha with two labels, beta with one; each with two validation cases."""
    for name, labeled, first in (("alpha", ["case-1", "case-0"], 0), ("beta", ["case-0"], 10)):
        make_site(name, cases=5, first_seed=first, data={"labeled": labeled, "validation": ["case-3", "case-4"]})
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump(tiny_plan("training.rounds=1", *assignments).model_dump(mode="json")))
    return plan, folder / "sites"


class Recorder:
    """Runs jobs in this process and records them; can simulate Ctrl-C before a given job."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.ran: list[Job] = []
        self._interrupt_at = interrupt_at

    def __call__(self, job: Job) -> None:
        if len(self.ran) == self._interrupt_at:
            raise KeyboardInterrupt
        self.ran.append(job)
        with contextlib.suppress(SemiSAMError):  # also in the run folder
            if isinstance(job.arm, OracleArm):
                oracle.execute(job.plan_path, job.sites, job.folder, job.arm.generalist, job.arm.clicks)
            else:
                in_process.execute(job.plan_path, job.sites, job.folder, job.site)

    @property
    def titles(self) -> list[str]:
        return [job.title for job in self.ran]


def prepare(study: tuple[Path, Path], out: Path, resume: bool = False, **changes: Any) -> tuple[Comparison, Console]:
    """Prepare a comparison; return it and the console it prints to."""
    console = Console(file=io.StringIO(), width=300)
    assignments = changes.pop("assignments", [])
    request = Request(study[0], study[1], out, assignments, changes.pop("file", None), changes, resume)
    return Comparison.prepare(request, console), console


def shown(console: Console) -> str:
    """Return what was printed to a console."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
