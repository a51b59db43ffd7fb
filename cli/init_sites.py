"""Write the site files of a study whose cases are listed in a CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically

COLUMNS = ("case", "site", "split")
SPLITS = ("train", "val")

TEMPLATE = """\
# One hospital of a study. This file stays at the site; nothing in it is ever sent but the site's name.
version: 1

# Lowercase letters, digits and dashes. Appears in the server's record.
site: {site}

data:
  # Folders of NIfTI files. An image and its label have one name. Relative paths count from this file's folder.
  images: {images}
  labels: {labels}
  # Cases whose expert labels are trained on, or `all` that have a label. Every other train case is unlabeled: its
  # label, if it has one, is never read.
  labeled: [{labeled}]
  # Cases whose labels are for scoring only.
  validation: [{validation}]
  # Cases never to touch.
  excluded: [{excluded}]
  # Classes of the plan that the label files mark: all, or a list of names. A voxel without a label may then be any
  # class that is not named; training leaves that open, and scores are of the named classes only.
  labeled_classes: all

# Frozen foundation models at this site: `packaged` weights, or a file with its SHA-256.
generalists: {generalists}

# auto takes a GPU where there is one; or cpu, cuda, cuda:1.
device: auto
# CPU threads; leave out to take all.
threads: 1

storage:
  # The site's own state: teacher, pseudo-labels, embeddings, prepared scans, audit log.
  folder: {storage}
  # Disk for stored embeddings; the least recently used go first.
  embeddings_gb: 10.0
  # Memory for prepared scans.
  memory_gb: 4.0

# Limits on what may leave. A plan cannot loosen them.
egress:
  maximum_update_mb: 500.0
  # Means over validation cases that may leave; [] sends none.
  validation_scores: [dice, jaccard, hd95_mm, asd_mm, surface_dice, cases, missing_distances]
"""


def write_site_files(
    images: Path,
    labels: Path,
    table: Path,
    out: Path,
    labeled: str,
    storage: Path,
    generalists: Sequence[str],
) -> list[Path]:
    """Write one site file for each site that the table names.

    Args:
        images: folder of all images.
        labels: folder of all labels.
        table: CSV with the columns case, site, split.
        out: folder of the site files.
        labeled: how many train cases of each site are labeled, one number or one for each site in name order.
        storage: folder under which each site gets its own.
        generalists: generalists every site has, with packaged weights.

    Raises:
        ConfigError: a folder or column is missing, or a number does not fit.
    """
    for what, folder in (("images", images), ("labels", labels)):
        if not folder.is_dir():
            raise ConfigError(f"--{what} {folder}: there is no such folder.")
    rows = _read_table(table)
    sites = sorted({row["site"] for row in rows})
    counts = _labeled_counts(labeled, sites)
    paths = []
    everything = sorted({row["case"] for row in rows} | _stems(images))
    for site in sites:
        train = sorted(row["case"] for row in rows if row["site"] == site and row["split"] == "train")
        validation = sorted(row["case"] for row in rows if row["site"] == site and row["split"] == "val")
        if counts[site] > len(train):
            raise ConfigError(f"--labeled {labeled}: {site} has only {len(train)} train cases.")
        elsewhere = [case for case in everything if case not in train and case not in validation]
        content = TEMPLATE.format(
            site=site,
            images=images.resolve(),
            labels=labels.resolve(),
            labeled=", ".join(train[: counts[site]]),
            validation=", ".join(validation),
            excluded=", ".join(elsewhere),
            generalists="{" + ", ".join(f"{name}: {{weights: packaged}}" for name in generalists) + "}",
            storage=(storage / site).resolve(),
        )
        path = out / f"{site}.yaml"
        write_atomically(path, content.encode())
        paths.append(path)
    return paths


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"--table {path}: cannot be read ({error.strerror}).") from None
    if not rows or any(column not in rows[0] for column in COLUMNS):
        raise ConfigError(f"--table {path}: a header with the columns {', '.join(COLUMNS)} and rows are expected.")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise ConfigError(f"{path}: line {number}: split = {row['split']!r}; accepted: {', '.join(SPLITS)}.")
        if row["case"] in seen:
            raise ConfigError(f"{path}: line {number}: the case {row['case']} is listed twice.")
        seen.add(row["case"])
    return rows


def _labeled_counts(text: str, sites: Sequence[str]) -> dict[str, int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len(parts) not in (1, len(sites)):
        raise ConfigError(f"--labeled {text}: expected is one number, or {len(sites)}, for {', '.join(sites)}.")
    numbers = [int(part) for part in parts]
    return dict(zip(sites, numbers * len(sites) if len(numbers) == 1 else numbers, strict=True))


def _stems(folder: Path) -> set[str]:
    return {path.name.removesuffix(".gz").removesuffix(".nii") for path in folder.glob("*.nii*")}
