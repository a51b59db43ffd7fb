"""The site files of a comparison: each site with its first k labels, and all sites' data in one place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from client.site_config import SiteConfig, SiteData, Storage, inventory
from experiments.comparison.definition import ALL, label_counts
from semisam_core.data.cases import Case, Inventory, Role
from semisam_core.data.names import nifti_suffix
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically
from semisam_core.plan import Plan
from semisam_core.reporting.bootstrap import CaseKey

POOLED = "pooled"
SHARED = ("prepared", "embeddings")  # both keyed by content, so that a link serves as well as a copy

Sites = Sequence[tuple[SiteConfig, Inventory]]


@dataclass(frozen=True)
class Cohort:
    """The sites under one label count.

    Attributes:
        setting: the label count, as in the definition.
        labeled: site -> the cases whose labels are trained on.
        sites: folder of the site files.
        storages: site -> its storage folder.
        pooled_sites: folder of the one site file that has all sites' data, where an arm needs it.
        pooled_storage: that site's storage folder.
        origin: case of the pooled site -> (site, case); empty where no arm needs it.
    """

    setting: str
    labeled: Mapping[str, tuple[str, ...]]
    sites: Path
    storages: Mapping[str, Path]
    pooled_sites: Path
    pooled_storage: Path
    origin: Mapping[str, CaseKey]


@dataclass(frozen=True)
class _Virtual:
    """One case of the pooled site: where it is from, what it may be used for."""

    id: str
    key: CaseKey
    case: Case


def fingerprint(sites: Sites) -> str:
    """Return a hash of the site files and of which cases they find: names, roles and sizes of files."""
    content = [
        [
            config.model_dump(mode="json"),
            [[case.id, case.role.value, [path.stat().st_size for path in _files(case)]] for case in found.cases],
        ]
        for config, found in sites
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def narrowed(sites: Sites, setting: str, plan: Plan) -> list[tuple[SiteConfig, Inventory]]:
    """Return the sites with the first labeled cases of each site's list; the others become unlabeled.

    Raises:
        ConfigError: a site has too few labeled cases, none is left anywhere, or nothing could teach at a site.
    """
    listed = {config.site: _listed(config, found) for config, found in sites}
    counts = label_counts(setting, listed)
    if not any(counts.values()):
        raise ConfigError(f"labeled: {setting}: no site has a labeled case then, and nothing could begin to learn.")
    if setting == ALL:
        return list(sites)
    result = []
    for config, _ in sites:
        kept = listed[config.site][: counts[config.site]]
        changed = config.model_copy(update={"data": config.data.model_copy(update={"labeled": kept})})
        result.append((changed, inventory(changed, plan)))
    return result


def write_cohort(folder: Path, setting: str, sites: Sites, pooled: bool) -> Cohort:
    """Write the site files of one label count, and where it is needed the pooled site's with links to all sites' files.

    Labels of unlabeled cases are not linked: nothing at the pooled site could read them.

    Args:
        folder: the comparison's folder.
        setting: the label count.
        sites: as `narrowed` returned them.
        pooled: whether an arm has all data in one place.

    Raises:
        ConfigError: sites disagree on a generalist's weights, or two cases would share a name. Nothing is written then.
    """
    place, storage = folder / "sites" / f"labels-{setting.replace(',', '-')}", folder / "storage" / POOLED
    cases = _virtual_cases(sites) if pooled else []
    if pooled:
        united = _united([config for config, _ in sites], cases, place / POOLED, storage)
        _link_cases(cases, place / POOLED)
        _write_site(place / POOLED / f"{POOLED}.yaml", united)
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
    """Link what the sites have prepared and encoded into the pooled site's storage, so that it is not made again.

    The pooled site writes by renaming over a link and evicts by removing one; the sites' own files stay as they are.
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
    """Return a site's usable labeled cases in the order of its own list, or by name where it says `all`."""
    usable = [case.id for case in found.of(Role.LABELED)]
    if config.data.labeled == "all":
        return tuple(usable)
    return tuple(case for case in config.data.labeled if case in set(usable))


def _virtual_cases(sites: Sites) -> list[_Virtual]:
    cases: dict[str, _Virtual] = {}
    for config, found in sites:
        for case in found.cases:
            name = f"{config.site}--{case.id}"
            if name in cases:
                raise ConfigError(f"pooled: two cases would be called {name}; rename the site or a case.")
            cases[name] = _Virtual(name, (config.site, case.id), case)
    return list(cases.values())


def _link_cases(cases: Sequence[_Virtual], folder: Path) -> None:
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


def _united(configs: Sequence[SiteConfig], cases: Sequence[_Virtual], folder: Path, storage: Path) -> SiteConfig:
    """Return the pooled site: the sites' generalists, the first one's device, all their limits together."""
    generalists, annotated = dict(configs[0].generalists), configs[0].data.labeled_classes
    for config in configs[1:]:
        if config.data.labeled_classes != annotated:
            raise ConfigError(
                f"pooled: data.labeled_classes: site {config.site} has drawn other classes than site "
                f"{configs[0].site}; one pooled site cannot say so case by case. Leave the pooled arms out with --arms."
            )
        for name, entry in config.generalists.items():
            if generalists.setdefault(name, entry) != entry:
                raise ConfigError(
                    f"pooled: generalists.{name}: site {config.site} has other weights than another site; a pooled arm "
                    "needs one file for all. Leave the pooled arms out with --arms."
                )
    data = SiteData(
        images=folder / "images",
        labels=folder / "labels",
        labeled=tuple(each.id for each in cases if each.case.role is Role.LABELED),
        validation=tuple(each.id for each in cases if each.case.role is Role.VALIDATION),
        labeled_classes=annotated,
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
    )


def _write_site(path: Path, config: SiteConfig) -> None:
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def _files(case: Case) -> tuple[Path, ...]:
    return (*case.images, *((case.label,) if case.label is not None else ()))


def _suffix(path: Path) -> str:
    return nifti_suffix(path.name) or ".nii.gz"
