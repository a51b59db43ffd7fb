"""Small real runs for the tests of reports: a study in this process, with its sites' own runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from client.app import app as client_app
from client.site_config import SiteConfig, load_site_config
from engines.in_process_grid import run_in_process
from experiments.local_arms import supervised_alone
from semisam_core.plan import Plan
from server.app import app as server_app

EVIDENCE = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources.prototypes={generalist: fake}",
    "pseudo_labels.gates.minimum_volume_ml=0.0",
)


def run_study(plan: Plan, sites: Sequence[Path], folder: Path, alone: bool = False) -> list[SiteConfig]:
    """Run a study, and before it the sites' own runs if asked for; return the sites' configurations."""
    if alone:
        for site in sites:
            _run(supervised_alone(plan), [site], folder / "local" / load_site_config(site).site)
    _run(plan, sites, folder)
    return [load_site_config(site) for site in sites]


def _run(plan: Plan, sites: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
