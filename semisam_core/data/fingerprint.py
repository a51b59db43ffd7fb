"""What a site may say about its scans before there is a plan: rounded aggregates over patients, never a single scan's.

The quantities are those from which nnU-Net derives its settings (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semisam_core.plan_sections.task import Task
from semisam_core.small_numbers import IN_BUCKETS, Rounding, bucket

AXES = ("right-left", "posterior-anterior", "inferior-superior")
INTENSITIES = ("p0_5", "median", "p99_5")
ROUNDING = {"patients": IN_BUCKETS, "spacing_mm": Rounding("step", 0.05), "extent_mm": Rounding("step", 5.0)}
OTHERS = Rounding("digits", 2)


@dataclass(frozen=True)
class CaseFacts:
    """One scan's facts. They stay at the site.

    Attributes:
        patient: whose scan it is.
        spacing_mm: along the axes right-left, posterior-anterior, inferior-superior.
        extent_mm: likewise.
        intensities: (C, 3) percentiles 0.5, 50, 99.5 of each channel over the whole scan.
        volumes_ml: class name -> volume, of labeled scans only.
        foreground: (C, 3) the same percentiles inside the labels, of scans on which something is labeled.
    """

    patient: str
    spacing_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    intensities: NDArray[np.float64]
    volumes_ml: Mapping[str, float]
    foreground: NDArray[np.float64] | None = None


def fingerprint_scalars(task: Task) -> tuple[str, ...]:
    """Return the names of all scalars that a fingerprint may have."""
    names = ["patients"]
    for axis in AXES:
        names += [f"spacing_mm.{axis}.{which}" for which in ("p10", "median", "p90")]
        names += [f"extent_mm.{axis}.{which}" for which in ("median", "p90")]
    for where in ("intensity", "foreground"):
        names += [f"{where}.{channel}.{which}" for channel in task.channels for which in INTENSITIES]
    names += [f"volume_ml.{each.name}.{which}" for each in task.classes for which in ("p10", "median", "p90")]
    return tuple(names)


def rounding_of(name: str) -> Rounding:
    """Return how a scalar of a fingerprint is rounded."""
    return ROUNDING.get(name.partition(".")[0], OTHERS)


def fingerprint(cases: Sequence[CaseFacts], task: Task, minimum_patients: int) -> dict[str, float | int]:
    """Return the rounded aggregates over patients, each patient's scans averaged first.

    With fewer patients than the minimum nothing but `patients: 0` is returned; of a class and of the foreground nothing
    with fewer labeled patients. Numbers of patients are rounded down to one of `small_numbers.BUCKETS`. The order of
    the scans changes no bit.

    Args:
        cases: the site's scans.
        task: classes and channels.
        minimum_patients: at least 1.
    """
    by_patient: dict[str, list[CaseFacts]] = {}
    for case in cases:
        by_patient.setdefault(case.patient, []).append(case)
    patients = list(by_patient.values())
    if len(patients) < max(1, minimum_patients):
        return {"patients": 0}
    found: dict[str, float | int] = {"patients": bucket(len(patients))}
    for k, axis in enumerate(AXES):
        spacing = [_mean(case.spacing_mm[k] for case in own) for own in patients]
        for which, share in (("p10", 10), ("median", 50), ("p90", 90)):
            name = f"spacing_mm.{axis}.{which}"
            found[name] = rounding_of(name)(float(np.percentile(spacing, share)))
        extent = [_mean(case.extent_mm[k] for case in own) for own in patients]
        for which, share in (("median", 50), ("p90", 90)):
            name = f"extent_mm.{axis}.{which}"
            found[name] = rounding_of(name)(float(np.percentile(extent, share)))
    found |= _intensities("intensity", [[case.intensities for case in own] for own in patients], task)
    labeled = [inside for own in patients if (inside := [c.foreground for c in own if c.foreground is not None])]
    if len(labeled) >= max(1, minimum_patients):
        found |= _intensities("foreground", labeled, task)
    for target in task.classes:
        known = [[c.volumes_ml[target.name] for c in own if target.name in c.volumes_ml] for own in patients]
        volumes = [_mean(own) for own in known if own]
        if len(volumes) >= max(1, minimum_patients):
            for which, share in (("p10", 10), ("median", 50), ("p90", 90)):
                name = f"volume_ml.{target.name}.{which}"
                found[name] = rounding_of(name)(float(np.percentile(volumes, share)))
    return found


def _intensities(where: str, patients: Sequence[Sequence[NDArray[np.float64]]], task: Task) -> dict[str, float]:
    """Return the medians over patients of each channel's percentiles."""
    return {
        f"{where}.{channel}.{which}": OTHERS(
            float(np.median([_mean(float(each[c, k]) for each in own) for own in patients]))
        )
        for c, channel in enumerate(task.channels)
        for k, which in enumerate(INTENSITIES)
    }


def _mean(values: Iterable[float]) -> float:
    """Return the mean; exactly summed, so that it does not depend on the order."""
    known = list(values)
    return math.fsum(known) / len(known)
