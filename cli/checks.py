"""What can be found wrong with a study before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from client.site_config import SiteConfig, inventory, load_site_folder, usable_generalists
from semisam_core.data.cases import Inventory, Role
from semisam_core.plan import Plan, load_plan


@dataclass(frozen=True)
class CheckedStudy:
    """A plan and the sites that can work by it."""

    plan: Plan
    sites: tuple[tuple[SiteConfig, Inventory], ...]


def check_study(plan_path: Path, sites_folder: Path, assignments: list[str]) -> CheckedStudy:
    """Read plan and site files, find every site's cases and devices.

    Raises:
        ConfigError: something is wrong; the message names file, key, value and what is accepted.
    """
    plan = load_plan(plan_path, assignments)
    checked = []
    for config in load_site_folder(sites_folder):
        config.torch_device()
        checked.append((config, inventory(config, plan)))
    return CheckedStudy(plan, tuple(checked))


def study_table(study: CheckedStudy) -> Table:
    """Return a table of what each site would use."""
    table = Table(title=f"Study {study.plan.task.name}: {', '.join(study.plan.class_names)}")
    for column in ("site", "labeled", "unlabeled", "validation", "left out", "generalists", "device"):
        table.add_column(column)
    for config, found in study.sites:
        counts = [str(len(found.of(role))) for role in (Role.LABELED, Role.UNLABELED, Role.VALIDATION)]
        models = ", ".join(usable_generalists(config, study.plan)) or "none"
        table.add_row(config.site, *counts, str(len(found.quarantined)), models, str(config.torch_device()))
    return table
