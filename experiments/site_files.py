"""Write the site files of a study whose cases are listed in a CSV."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from deployment.site_template import TEMPLATE
from experiments.case_table import CaseRow, read_case_table
from semisam_core.configuration import NAME_ACCEPTED, flow_yaml, is_name
from semisam_core.data.names import case_name, nifti_suffix
from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically
from semisam_core.generalists import accepted_prompts
from semisam_core.paths import absolute_path, writable_folder

CHANNEL = re.compile(r"(.+)_[0-9]{4}")


def write_site_files(
    images: Path,
    labels: Path,
    table: Path,
    out: Path,
    labeled: str,
    storage: Path,
    generalists: Sequence[str],
) -> list[Path]:
    """Write one site file for each site in the table; nothing is written unless all of them can be.

    Args:
        images: folder of all images.
        labels: folder of all labels.
        table: CSV with the columns case, site, split.
        out: folder for the site files.
        labeled: how many train cases of each site are labeled: one number, or one per site in name order.
        storage: folder under which each site gets its own.
        generalists: generalists that every site has, with packaged weights.

    Raises:
        ConfigError: a folder, column or generalist does not exist, a site's name is not accepted, or a number does not
            fit.
    """
    images, labels = _existing(images, "--images"), _existing(labels, "--labels")
    rows = read_case_table(table)
    sites = _site_names(rows, table)
    for name in generalists:
        accepted_prompts(name)
    counts = _labeled_counts(labeled, sites)
    storage = absolute_path(storage, "--storage")
    everything = sorted(_cases_in(images, {row.case for row in rows}))
    contents = {
        site: TEMPLATE.format(
            site=flow_yaml(site),
            images=flow_yaml(str(images)),
            labels=flow_yaml(str(labels)),
            split="null",
            generalists=flow_yaml({name: {"weights": "packaged"} for name in generalists}),
            storage=flow_yaml(str(storage / site)),
            numbers="exact",  # nothing leaves the researcher's machine
            ledger="null",
            **_case_lists(rows, site, counts[site], everything),
        )
        for site in sites
    }
    out = writable_folder(out, "--out")
    paths = {out / f"{site}.yaml": content for site, content in contents.items()}
    for path, content in paths.items():
        write_atomically(path, content.encode())
    return list(paths)


def _existing(folder: Path, option: str) -> Path:
    absolute = absolute_path(folder, option)
    if not absolute.is_dir():
        raise ConfigError(f"{option} {folder}: there is no such folder.")
    return absolute


def _site_names(rows: Sequence[CaseRow], table: Path) -> list[str]:
    """Return the sites in the table, sorted; each is checked against the pattern that every command uses."""
    names = sorted({row.site for row in rows})
    for name in names:
        if not is_name(name):
            raise ConfigError(f"--table {table}: site = {name!r}: a site's name has {NAME_ACCEPTED}.")
    return names


def _case_lists(rows: Sequence[CaseRow], site: str, labeled: int, everything: Sequence[str]) -> dict[str, str]:
    """Return what a site file lists under labeled, validation and excluded, as YAML."""
    train, validation = (
        sorted(row.case for row in rows if row.site == site and row.split == split) for split in ("train", "val")
    )
    if labeled > len(train):
        raise ConfigError(f"--labeled: {site} has only {len(train)} train cases, fewer than {labeled}.")
    others = [case for case in everything if case not in {*train, *validation}]
    return {"labeled": _items(train[:labeled]), "validation": _items(validation), "excluded": _items(others)}


def _items(names: Sequence[str]) -> str:
    """Return names as the items of a YAML list, without its brackets."""
    return flow_yaml(list(names))[1:-1]


def _labeled_counts(text: str, sites: Sequence[str]) -> dict[str, int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(parts) not in (1, len(sites)):
        raise ConfigError(f"--labeled {text}: expected one number, or {len(sites)}: one each for {', '.join(sites)}.")
    numbers = [int(part) for part in parts]
    return dict(zip(sites, numbers * len(sites) if len(numbers) == 1 else numbers, strict=True))


def _cases_in(folder: Path, listed: Collection[str]) -> set[str]:
    """Return the cases that a folder of images holds, going by file names.

    `x_0000.nii.gz` is a channel of case `x` if the table lists `x`, or if every image not in the table is numbered.
    """
    stems = {stem for path in folder.iterdir() if (stem := _stem(path, folder)) and stem not in listed}
    numbered = all(CHANNEL.fullmatch(stem) for stem in stems)
    cases = set(listed)
    for stem in stems:
        channel = CHANNEL.fullmatch(stem)
        cases.add(channel[1] if channel and (numbered or channel[1] in listed) else stem)
    return cases


def _stem(path: Path, folder: Path) -> str | None:
    """Return an image's name without its suffix, or None for any other file."""
    suffix = nifti_suffix(path.name)
    if suffix is None or path.name.startswith("."):
        return None
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--images {folder}: the file name {path.name!a} is not UTF-8; rename the file.") from None
    return case_name(path.name[: -len(suffix)])
