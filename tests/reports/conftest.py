"""One small real run for all tests of reports: two sites that send exact numbers, one that rounds and withholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from client.site_config import SiteConfig
from experiments.intervals import case_intervals
from reports.lead.intervals import write_intervals
from semisam_core.plan import Plan
from tests.browser import browser as browser
from tests.conftest import tiny_plan, write_blobs, write_site
from tests.reports.runs import EVIDENCE, run_study


@dataclass(frozen=True)
class Ran:
    """A finished run: its folder, the plan and the sites."""

    folder: Path
    plan: Plan
    sites: Sequence[SiteConfig]

    def site(self, name: str) -> SiteConfig:
        return next(config for config in self.sites if config.site == name)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, _fake_generalist: None) -> Ran:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("study")
    plan = tiny_plan(*EVIDENCE)
    six = {"labeled": ["case-0"], "validation": [f"case-{k}" for k in range(2, 8)]}
    for k, name in enumerate(("alpha", "beta", "gamma")):
        write_blobs(base / "data" / name, 8 if name == "alpha" else 3, 10 * k)
    paths = [
        write_site(base, "alpha", data=six),
        write_site(base, "beta"),
        write_site(base, "gamma", egress={"numbers": "rounded"}),
    ]
    folder = base / "run"
    sites = run_study(plan, paths, folder, alone=True)
    local = {config.site: folder / "local" / config.site for config in sites}
    write_intervals(folder, case_intervals(sites, folder, local, plan.class_names))
    return Ran(folder, plan, sites)
