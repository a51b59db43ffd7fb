"""Read the fingerprints that sites sent, and say whose scans are unlike the others'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam_core.configuration import StrictModel, is_name, parse, read_yaml
from semisam_core.data.fingerprint import AXES, fingerprint_scalars
from semisam_core.errors import ConfigError
from semisam_core.plan_sections.task import Task

UNLIKE_SPACING, UNLIKE_VOLUME = 2.0, 1.5  # ratio to the others' median
UNLIKE_CT = 150.0  # HU
LARGEST = 1e9


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
        ConfigError: a file is no fingerprint, is for another task, or has other numbers than agreed; two are of one
            site; or none is left.
    """
    found: dict[str, SiteFingerprint] = {}
    allowed = set(fingerprint_scalars(task))
    for path in paths:
        each = parse(SiteFingerprint, read_yaml(path), str(path))
        if each.version != 1 or not is_name(each.site):
            raise ConfigError(f"{path}: no fingerprint of version 1 of a site.")
        if each.site in found:
            raise ConfigError(f"{path}: the site {each.site} is there twice.")
        if (each.task.classes, each.task.channels) != (task.classes, task.channels):
            raise ConfigError(f"{path}: it was made for other classes or channels than the draft's.")
        wrong = [name for name, value in each.fingerprint.items() if name not in allowed or abs(value) > LARGEST]
        if wrong:
            raise ConfigError(f"{path}: {', '.join(sorted(wrong)[:3])}: not on the list of what a fingerprint has.")
        found[each.site] = each
    usable = [each for each in found.values() if each.patients > 0]
    if not usable:
        raise ConfigError("no fingerprint says anything: every site has fewer patients than it lets be counted.")
    return sorted(usable, key=lambda each: each.site)


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
        for name, what, limit in _watched(task):
            own, usual = each.fingerprint.get(name), weighted_median(sites, name)
            if own is None or usual is None:
                continue
            unlike = abs(own - usual) > limit if "intensity" in name else not 1 / limit < _ratio(own, usual) < limit
            if unlike:
                sentences.append(f"{each.site}: {what} is {own:g}, over all sites {usual:g}.")
    return sentences


def _watched(task: Task) -> list[tuple[str, str, float]]:
    watched: list[tuple[str, str, float]] = []
    watched += [(f"spacing_mm.{axis}.median", f"the voxel size {axis} (mm)", UNLIKE_SPACING) for axis in AXES]
    watched += [(f"volume_ml.{c.name}.median", f"the volume of {c.name} (ml)", UNLIKE_VOLUME) for c in task.classes]
    ct = [channel for channel in task.channels if is_ct(channel)]
    watched += [(f"intensity.{each}.median", f"the median intensity of {each} (HU)", UNLIKE_CT) for each in ct]
    return watched


def is_ct(channel: str) -> bool:
    """Return whether a channel's values mean the same at every site, by its name."""
    return "ct" in channel.split("-")


def _ratio(own: Any, usual: Any) -> float:
    return float(own) / float(usual) if usual else np.inf
