"""Check a study before any work is done: its plan, its site files, weights, classes and devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.site_config import SiteConfig, annotated_classes, inventory, load_site_folder, usable_generalists
from engines.tables import FittingTable
from semisam_core.data.cases import Inventory, Role
from semisam_core.errors import ConfigError
from semisam_core.generalists import generalist_spec
from semisam_core.paths import absolute_path
from semisam_core.plan import Plan, load_plan
from semisam_core.specialists import memory_estimate


@dataclass(frozen=True)
class CheckedStudy:
    """A plan, and the sites that can take part in it with the cases each has."""

    plan: Plan
    sites: tuple[tuple[SiteConfig, Inventory], ...]


def check_study(plan_path: Path, sites_folder: Path, assignments: list[str]) -> CheckedStudy:
    """Read the plan and all site files; find every site's cases and device. Reads no scan.

    Args:
        plan_path: the study plan.
        sites_folder: folder of site files.
        assignments: overrides of the plan, such as `training.rounds=3`.

    Raises:
        ConfigError: file, key, value and what is accepted.
    """
    plan = load_plan(absolute_path(plan_path, "--plan"), assignments)
    checked = []
    for config in load_site_folder(absolute_path(sites_folder, "--sites")):
        config.torch_device()
        _check_weights(config, plan)
        checked.append((config, inventory(config, plan)))
    _check_classes(plan, checked)
    return CheckedStudy(plan, tuple(checked))


def _check_classes(plan: Plan, sites: Sequence[tuple[SiteConfig, Inventory]]) -> None:
    """Check that every class is annotated at some labeled site, if any site is labeled."""
    labeled = [config for config, found in sites if found.of(Role.LABELED)]
    annotated = {k for config in labeled for k in annotated_classes(config, plan)}
    missing = [name for k, name in enumerate(plan.class_names, start=1) if k not in annotated]
    if labeled and missing:
        raise ConfigError(
            f"no site with labeled cases names {', '.join(missing)} under data.labeled_classes, so nothing could "
            "teach that class. Name it at a site whose labels mark it, or remove the class from the plan."
        )


def _check_weights(config: SiteConfig, plan: Plan) -> None:
    """Check that the generalists' packages and weight files exist; hashes are checked on loading."""
    for name in usable_generalists(config, plan):
        spec, entry = generalist_spec(name), config.generalists[name]
        key = f"site {config.site}: generalists.{name}"
        if not spec.installed:
            raise ConfigError(f"{key}: the Python package {spec.module} is missing; install fedsemisam[{spec.extra}].")
        published = f"Published as: {spec.card.source}. Licence: {spec.card.licence}."
        if entry.weights == "packaged" and not spec.packaged:
            raise ConfigError(f"{key}.weights = 'packaged': no package ships these weights; give a file. {published}")
        if entry.weights != "packaged" and not Path(entry.weights).is_file():
            raise ConfigError(f"{key}.weights = {str(entry.weights)!r}: there is no such file. {published}")


def study_table(study: CheckedStudy) -> FittingTable:
    """Return one row per site: the cases, generalists and device it would use."""
    plan = study.plan
    batch = plan.training.labeled_batch + (plan.training.unlabeled_batch if plan.uses_unlabeled else 0)
    step = memory_estimate(
        plan.specialist.name,
        plan.specialist.arguments,
        len(plan.task.channels),
        len(plan.class_names),
        plan.data.patch,
        batch,
    )
    table = FittingTable(
        "site",
        "labeled",
        "unlabeled",
        "validation",
        "left out",
        "generalists",
        "device",
        title=f"Study {plan.task.name}: {', '.join(plan.class_names)}",
        caption=f"Specialist {plan.specialist.name}: about {step / 2**30:.2f} GiB for a training step.",
    )
    for config, found in study.sites:
        counts = [str(len(found.of(role))) for role in (Role.LABELED, Role.UNLABELED, Role.VALIDATION)]
        if config.data.labeled_classes != "all":
            counts[0] += f" ({', '.join(config.data.labeled_classes)})"
        models = ", ".join(usable_generalists(config, study.plan)) or "none"
        table.add(config.site, *counts, str(len(found.quarantined)), models, str(config.torch_device()))
    return table
