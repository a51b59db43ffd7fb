"""The site files of a comparison: each site with its first k labels, and one pooled site with all data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from client.site_config import Egress, SiteConfig, SiteData, Storage, inventory
from experiments.comparison.definition import ALL, label_counts
from semisam_core.data.cases import Case, Inventory, Role
from semisam_core.data.names import nifti_suffix
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically
from semisam_core.plan import Plan
from semisam_core.reporting.bootstrap import CaseKey

POOLED = "pooled"
SHARED = ("prepared", "embeddings", "transforms")  # all keyed by content, so a link is as good as a copy

Sites = Sequence[tuple[SiteConfig, Inventory]]


@dataclass(frozen=True)
class Cohort:
    """The sites under one label count.

    Attributes:
        setting: the label count, as in the definition.
        labeled: site -> the cases whose labels are trained on.
        sites: folder of the site files.
        storages: site -> its storage folder.
        pooled_sites: folder of the pooled site's file; exists only if an arm needs it.
        pooled_storage: the pooled site's storage folder.
        origin: case of the pooled site -> (site, case); empty if no arm needs it.
    """

    setting: str
    labeled: Mapping[str, tuple[str, ...]]
    sites: Path
    storages: Mapping[str, Path]
    pooled_sites: Path
    pooled_storage: Path
    origin: Mapping[str, CaseKey]


@dataclass(frozen=True)
class _PooledCase:
    """One case of the pooled site: its name there, where it comes from, and the case itself."""

    id: str
    key: CaseKey
    case: Case


def fingerprint(sites: Sites) -> str:
    """Return a hash of the site files and the cases they find: names, roles and file sizes."""
    content = [
        [
            config.model_dump(mode="json"),
            [[case.id, case.role.value, [path.stat().st_size for path in _files(case)]] for case in found.cases],
        ]
        for config, found in sites
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def narrowed(sites: Sites, setting: str, plan: Plan) -> list[tuple[SiteConfig, Inventory]]:
    """Keep the first labeled cases of each site's list; the others become unlabeled, whatever a review made of them.

    Raises:
        ConfigError: a site has too few labeled cases, none is left at any site, or a site could learn from nothing.
    """
    listed = {config.site: _listed(config, found) for config, found in sites}
    counts = label_counts(setting, listed)
    if not any(counts.values()):
        raise ConfigError(f"labeled: {setting}: no site would have a labeled case to learn from.")
    result = []
    for config, _ in sites:
        kept = config.data.labeled if setting == ALL else listed[config.site][: counts[config.site]]
        changed = config.model_copy(
            update={"data": config.data.model_copy(update={"labeled": kept, "reviewed": False})}
        )
        result.append((changed, inventory(changed, plan)))
    return result


def write_cohort(folder: Path, setting: str, sites: Sites, pooled: bool) -> Cohort:
    """Write the site files of one label count and, if needed, the pooled site with links to all sites' files.

    Labels of unlabeled cases are not linked, so nothing at the pooled site can read them.

    Args:
        folder: the comparison's folder.
        setting: the label count.
        sites: as `narrowed` returned them.
        pooled: whether an arm trains on all data in one place.

    Raises:
        ConfigError: sites differ in a generalist's weights or in labeled classes, or two cases would share a name.
            Nothing is written then.
    """
    place, storage = folder / "sites" / f"labels-{setting.replace(',', '-')}", folder / "storage" / POOLED
    cases = _pooled_cases(sites) if pooled else []
    if pooled:
        pooled_site = _pooled_site([config for config, _ in sites], cases, place / POOLED, storage)
        _link_cases(cases, place / POOLED)
        _write_site(place / POOLED / f"{POOLED}.yaml", pooled_site)
    for config, _ in sites:
        _write_site(place / "each" / f"{config.site}.yaml", config)
    return Cohort(
        setting=setting,
        labeled={config.site: tuple(case.id for case in found.of(Role.LABELED)) for config, found in sites},
        sites=place / "each",
        storages={config.site: config.storage.folder for config, _ in sites},
        pooled_sites=place / POOLED,
        pooled_storage=storage,
        origin={each.id: each.key for each in cases},
    )


def lend_storage(cohort: Cohort) -> None:
    """Link the sites' prepared scans and embeddings into the pooled site's storage, so they are not computed again.

    The pooled site writes by renaming over a link and evicts by removing it; the sites' own files are not changed.
    """
    for storage in cohort.storages.values():
        for kind in SHARED:
            target = cohort.pooled_storage / kind
            target.mkdir(parents=True, exist_ok=True)
            for path in (storage / kind).glob("*.safetensors"):
                link = target / path.name
                if not link.exists():
                    link.unlink(missing_ok=True)  # a link whose file was evicted at the site
                    link.symlink_to(path)


def _listed(config: SiteConfig, found: Inventory) -> tuple[str, ...]:
    """Return a site's usable labeled cases in the order of its own list, or by name if it says `all`."""
    usable = [case.id for case in found.of(Role.LABELED)]
    if config.data.labeled == "all":
        return tuple(usable)
    return tuple(case for case in config.data.labeled if case in set(usable))


def _pooled_cases(sites: Sites) -> list[_PooledCase]:
    cases: dict[str, _PooledCase] = {}
    for config, found in sites:
        for case in found.cases:
            name = f"{config.site}--{case.id}"
            if name in cases:
                raise ConfigError(f"pooled: two cases would both be called {name}; rename a site or a case.")
            cases[name] = _PooledCase(name, (config.site, case.id), case)
    return list(cases.values())


def _link_cases(cases: Sequence[_PooledCase], folder: Path) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    wanted: dict[Path, Path] = {}
    for each in cases:
        several = len(each.case.images) > 1
        for channel, image in enumerate(each.case.images):
            number = f"_{channel:04d}" if several else ""
            wanted[folder / "images" / f"{each.id}{number}{_suffix(image)}"] = image
        if each.case.label is not None:
            wanted[folder / "labels" / f"{each.id}{_suffix(each.case.label)}"] = each.case.label
    for link, target in wanted.items():
        if not link.is_symlink() or Path(os.readlink(link)) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def _pooled_site(
    configs: Sequence[SiteConfig], cases: Sequence[_PooledCase], folder: Path, storage: Path
) -> SiteConfig:
    """Return the site that has all cases, with all generalists, the first site's device and all limits added up."""
    generalists, annotated = dict(configs[0].generalists), configs[0].data.labeled_classes
    for config in configs[1:]:
        if config.data.labeled_classes != annotated:
            raise ConfigError(
                f"pooled: data.labeled_classes: site {config.site} has labels of other classes than site "
                f"{configs[0].site}, and one pooled site cannot differ by case. Leave the pooled arms out with --arms."
            )
        for name, entry in config.generalists.items():
            if generalists.setdefault(name, entry) != entry:
                raise ConfigError(
                    f"pooled: generalists.{name}: site {config.site} has other weights than another site, and a pooled "
                    "arm needs one file for all. Leave the pooled arms out with --arms."
                )
    data = SiteData(
        images=folder / "images",
        labels=folder / "labels",
        labeled=tuple(each.id for each in cases if each.case.role is Role.LABELED),
        validation=tuple(each.id for each in cases if each.case.role is Role.VALIDATION),
        labeled_classes=annotated,
        reviewed=False,
    )
    return SiteConfig(
        version=1,
        site=POOLED,
        data=data,
        generalists=generalists,
        device=configs[0].device,
        threads=configs[0].threads,
        storage=Storage(
            folder=storage,
            memory_gb=sum(config.storage.memory_gb for config in configs),
            embeddings_gb=sum(config.storage.embeddings_gb for config in configs),
        ),
        egress=Egress(numbers="exact" if all(each.egress.numbers == "exact" for each in configs) else "rounded"),
        privacy=configs[0].privacy,
    )


def _write_site(path: Path, config: SiteConfig) -> None:
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def _files(case: Case) -> tuple[Path, ...]:
    return (*case.images, *((case.label,) if case.label is not None else ()))


def _suffix(path: Path) -> str:
    return nifti_suffix(path.name) or ".nii.gz"
