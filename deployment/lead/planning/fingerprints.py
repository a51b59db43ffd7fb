"""Read the fingerprints that sites sent, and say whose scans are unlike the others'."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam_core.configuration import StrictModel, is_name, parse
from semisam_core.data.fingerprint import AXES, INTENSITIES, fingerprint_scalars
from semisam_core.data.nifti import LARGEST_VOXEL_MM, LONGEST_EXTENT_MM
from semisam_core.errors import ConfigError
from semisam_core.plan_sections.task import Task
from semisam_core.small_numbers import BUCKETS

UNLIKE_SPACING, UNLIKE_VOLUME = 2.0, 1.5  # ratio to the median over all sites' patients
UNLIKE_CT = 150.0  # HU
LARGEST_FILE = 2**20  # bytes; 64 classes and 8 channels take 20 KB
SMALLEST_VOXEL_MM, LARGEST_VOLUME_ML, LARGEST_INTENSITY = 0.05, 1e6, 1e9


class SiteFingerprint(StrictModel):
    """One site's file."""

    version: int
    site: str
    task: Task
    fingerprint: dict[str, float]

    @property
    def patients(self) -> float:
        """Number of patients, rounded down; 0 if there are too few to say anything."""
        return self.fingerprint.get("patients", 0)


def read_fingerprints(paths: Sequence[Path], task: Task) -> list[SiteFingerprint]:
    """Read the sites' files; those of sites with too few patients are left out of the list.

    Raises:
        ConfigError: a file is no fingerprint, is for another task, or has other numbers than agreed or impossible ones;
            two are of one site; or none is left.
    """
    found: dict[str, SiteFingerprint] = {}
    for path in paths:
        each = parse(SiteFingerprint, _read_json(path), str(path))
        if each.version != 1 or not is_name(each.site):
            raise ConfigError(f"{path}: no fingerprint of version 1 of a site.")
        if each.site in found:
            raise ConfigError(f"{path}: the site {each.site} is there twice.")
        if (each.task.classes, each.task.channels) != (task.classes, task.channels):
            raise ConfigError(f"{path}: it was made for other classes or channels than the draft's.")
        if mistake := _mistake(each.fingerprint, task):
            raise ConfigError(f"{path}: {mistake}")
        found[each.site] = each
    usable = [each for each in found.values() if each.patients > 0]
    if not usable:
        raise ConfigError("no fingerprint says anything: every site has fewer patients than it lets be counted.")
    return sorted(usable, key=lambda each: each.site)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file. It is not read as YAML, to which 1e-05 is a word.

    Raises:
        ConfigError: the file is missing, unreadable, too large, not JSON, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read ({error.strerror}).") from None
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{path}: the file is larger than {LARGEST_FILE >> 20} MB, which no fingerprint is.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: this is not what `semisam site fingerprint` writes, which is JSON.")
    return content


def _mistake(scalars: Mapping[str, float], task: Task) -> str | None:
    """Return a sentence on what no honest site would have written, or None."""
    if unknown := sorted(set(scalars) - set(fingerprint_scalars(task))):
        return f"{unknown[0][:80]!a} is not on the list of what a fingerprint has."
    if scalars.get("patients") not in BUCKETS:
        return f"patients is missing or none of {', '.join(str(each) for each in BUCKETS)}."
    if scalars["patients"] == 0:
        return "there are too few patients, yet there are numbers about them." if len(scalars) > 1 else None
    for stem, kinds, low, high, required in _families(task):
        names = [f"{stem}.{kind}" for kind in kinds]
        values = [scalars[name] for name in names if name in scalars]
        if not values and not required:
            continue
        if len(values) < len(names):
            return f"of {', '.join(names)} at least one is missing."
        if not all(low <= value <= high for value in values) or values != sorted(values):
            return f"{', '.join(names)} are expected to rise, and to lie between {low:g} and {high:g}."
    return None


def _families(task: Task) -> list[tuple[str, tuple[str, ...], float, float, bool]]:
    """Return (beginning of the names, their ends in rising order, lowest, highest, whether they must be there)."""
    found: list[tuple[str, tuple[str, ...], float, float, bool]] = []
    for axis in AXES:
        found.append((f"spacing_mm.{axis}", ("p10", "median", "p90"), SMALLEST_VOXEL_MM, LARGEST_VOXEL_MM, True))
        found.append((f"extent_mm.{axis}", ("median", "p90"), 1.0, LONGEST_EXTENT_MM, True))
    for channel in task.channels:
        found.append((f"intensity.{channel}", INTENSITIES, -LARGEST_INTENSITY, LARGEST_INTENSITY, True))
        found.append((f"foreground.{channel}", INTENSITIES, -LARGEST_INTENSITY, LARGEST_INTENSITY, False))
    for target in task.classes:
        found.append((f"volume_ml.{target.name}", ("p10", "median", "p90"), 0.0, LARGEST_VOLUME_ML, False))
    return found


def weighted_median(sites: Sequence[SiteFingerprint], name: str) -> float | None:
    """Return the median over sites of one number, each weighted by its patients; None if no site has it."""
    known = sorted((each.fingerprint[name], each.patients) for each in sites if name in each.fingerprint)
    if not known:
        return None
    weights = np.cumsum([weight for _, weight in known])
    place = int(np.searchsorted(weights, weights[-1] / 2))
    middle = known[place][0]
    if weights[place] == weights[-1] / 2:  # exactly half of the patients lie on either side
        above = known[place + 1][0]
        return math.sqrt(middle * above) if min(middle, above) > 0 else (middle + above) / 2
    return middle


def outliers(sites: Sequence[SiteFingerprint], task: Task) -> list[str]:
    """Return a sentence for each number by which a site differs from the median over all patients."""
    sentences = []
    for each in sites:
        for name, what, limit, meaning in _watched(task):
            own, usual = each.fingerprint.get(name), weighted_median(sites, name)
            if own is None or usual is None:
                continue
            far = abs(own - usual) > limit if "_" not in name.partition(".")[0] else _ratio(own, usual) >= limit
            if far:
                sentences.append(f"{each.site}: {what} is {own:g}, over all sites {usual:g}. {meaning}")
    return sentences


def _watched(task: Task) -> list[tuple[str, str, float, str]]:
    """Return (name, what it is, limit, what it means if a site is beyond)."""
    watched: list[tuple[str, str, float, str]] = []
    for axis in AXES:
        meaning = "Its scans are resampled most; check the protocol, and whether the headers are right."
        watched.append((f"spacing_mm.{axis}.median", f"the voxel size {axis} (mm)", UNLIKE_SPACING, meaning))
    for target in task.classes:
        meaning = "Other patients, or another way of drawing; compare a few labels before the study begins."
        watched.append((f"volume_ml.{target.name}.median", f"the volume of {target.name} (ml)", UNLIKE_VOLUME, meaning))
    for channel in task.channels:
        if is_ct(channel):
            meaning = "Another contrast phase, or values that are not Hounsfield units; the plan's window is for all."
            watched.append(
                (f"foreground.{channel}.median", f"the median inside labels of {channel} (HU)", UNLIKE_CT, meaning)
            )
            meaning = "Values that are not Hounsfield units, or scans cut to the body; the plan's window is for all."
            watched.append((f"intensity.{channel}.p0_5", f"the darkest of {channel} (HU)", UNLIKE_CT, meaning))
    return watched


def is_ct(channel: str) -> bool:
    """Return whether a channel's values mean the same at every site, by its name."""
    return "ct" in channel.split("-")


def _ratio(own: float, usual: float) -> float:
    """Return by what factor two numbers differ, at least 1."""
    low, high = sorted((own, usual))
    return 1.0 if low == high else high / low if low > 0 else math.inf
