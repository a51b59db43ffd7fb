"""Derive spacing, patch, network, normalisation and gates from fingerprints, by nnU-Net's published heuristics.

Isensee et al., nnU-Net, Nature Methods 2021. Differences: one network for all sites, sized by a memory budget that the
lead names, and values that come from aggregates instead of scans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployment.lead.planning.fingerprints import SiteFingerprint, is_ct, weighted_median
from semisam_core.data.fingerprint import AXES
from semisam_core.plan import Plan
from semisam_core.specialists import memory_estimate

ANISOTROPIC = 3.0  # an axis with voxels this much longer than the others'
SMALLEST_LEVEL = 4  # voxels; an axis is not halved below
MOST_LEVELS, FEWEST_LEVELS = 6, 3
FIRST_FEATURES, MOST_FEATURES = 16, 320
LARGEST_SIDE, SMALLEST_SIDE = 256, 16
HALVINGS = 6  # of the range of patch sizes, until it is narrow enough
ROOM = 3.0  # gates lie this far outside of the volumes that sites have

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Proposal:
    """A plan, and why: path of keys -> sentence."""

    plan: Plan
    reasons: dict[tuple[str, ...], str]


def derive(draft: Plan, sites: Sequence[SiteFingerprint], memory_gb: float) -> Proposal:
    """Return the draft with what the sites' data decides.

    Args:
        draft: everything that data does not decide is kept.
        sites: at least one fingerprint.
        memory_gb: what a training step may take, of a GPU or of the machine.
    """
    content: dict[str, Any] = draft.model_dump(mode="json")
    reasons: dict[tuple[str, ...], str] = {}
    spacing = _spacing(sites, reasons)
    content["data"]["spacing_mm"] = list(spacing)
    content["data"]["intensity"] = _intensity(draft, sites, reasons)
    shape = _shape(sites, spacing)
    patch, arguments = _network(draft, shape, spacing, memory_gb * 1e9)
    content["data"]["patch"] = list(patch)
    content["specialist"] = {"name": "dynunet", "arguments": arguments, "statistics": None}
    reasons["data", "patch"] = (
        f"The median scan has about {shape[0]} x {shape[1]} x {shape[2]} voxels at this spacing; the largest patch of "
        f"its proportions whose training step takes at most {memory_gb:g} GB."
    )
    reasons["specialist", "name"] = (
        f"nnU-Net's U-Net: an axis is halved while its patch keeps {SMALLEST_LEVEL} voxels, long voxels later than "
        "short ones."
    )
    if content["pseudo_labels"] is not None:
        _gates(draft, sites, content["pseudo_labels"], reasons)
    return Proposal(Plan.model_validate(content, strict=False), reasons)


def _spacing(sites: Sequence[SiteFingerprint], reasons: dict[tuple[str, ...], str]) -> tuple[float, float, float]:
    medians = [float(weighted_median(sites, f"spacing_mm.{axis}.median") or 1.0) for axis in AXES]
    chosen = list(medians)
    reason = "The median over all sites' patients."
    long = max(range(3), key=lambda k: medians[k])
    others = [medians[k] for k in range(3) if k != long]
    if medians[long] / max(others) >= ANISOTROPIC:
        fine = float(weighted_median(sites, f"spacing_mm.{AXES[long]}.p10") or medians[long])
        chosen[long] = max(fine, max(others))
        times = medians[long] / max(others)
        reason += f" {AXES[long]}: the 10th percentile, since voxels there are {times:.1f} times longer."
    by_site = "; ".join(
        f"{each.site} " + " x ".join(f"{each.fingerprint[f'spacing_mm.{axis}.median']:g}" for axis in AXES)
        for each in sites
    )
    reasons["data", "spacing_mm"] = f"{reason} Medians by site: {by_site}."
    x, y, z = (round(side, 3) for side in chosen)
    return x, y, z


def _shape(sites: Sequence[SiteFingerprint], spacing: tuple[float, float, float]) -> Triple:
    sides = [
        max(SMALLEST_SIDE, round(float(weighted_median(sites, f"extent_mm.{axis}.median") or 100.0) / step))
        for axis, step in zip(AXES, spacing, strict=True)
    ]
    return sides[0], sides[1], sides[2]


def _intensity(draft: Plan, sites: Sequence[SiteFingerprint], reasons: dict[tuple[str, ...], str]) -> dict[str, Any]:
    channels = draft.task.channels
    if len(channels) == 1 and is_ct(channels[0]):
        low = weighted_median(sites, f"intensity.{channels[0]}.p0_5")
        high = weighted_median(sites, f"intensity.{channels[0]}.p99_5")
        if low is not None and high is not None and low < high:
            reasons["data", "intensity"] = (
                "CT: the 0.5 and 99.5 percentiles of the labeled structures (of whole scans where nothing is labeled)."
            )
            return {"kind": "window", "lower": low, "upper": high}
    reasons["data", "intensity"] = "Intensities have no unit across scanners: each scan is normalised by itself."
    return {"kind": "percentiles", "lower": 0.5, "upper": 99.5}


def _network(
    draft: Plan, shape: Triple, spacing: tuple[float, float, float], budget: float
) -> tuple[Triple, dict[str, Any]]:
    """Return the patch and the network's arguments: the largest of the scan's proportions that the budget allows."""
    batch = max(1, draft.training.labeled_batch + draft.training.unlabeled_batch)
    channels, classes = len(draft.task.channels), len(draft.task.classes)

    def sized(share: float) -> tuple[Triple, dict[str, Any]]:
        wanted = [max(float(SMALLEST_SIDE), share * min(LARGEST_SIDE, side)) for side in shape]
        arguments, divisor = _levels(wanted, spacing)
        x, y, z = (
            max(d * 2 if d > 1 else SMALLEST_SIDE, round(w / d) * d) for w, d in zip(wanted, divisor, strict=True)
        )
        return (x, y, z), arguments

    def fits(patch: Triple, arguments: dict[str, Any]) -> bool:
        return memory_estimate("dynunet", arguments, channels, classes, patch, batch) <= budget

    best, low, high = sized(0.0), 0.0, 1.0
    if fits(*(whole := sized(1.0))):
        return whole
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if fits(*(tried := sized(middle))):
            best, low = tried, middle
        else:
            high = middle
    return best


def _levels(patch: Sequence[float], spacing: tuple[float, float, float]) -> tuple[dict[str, Any], Triple]:
    sizes, steps, kernels = list(patch), list(spacing), [_kernel(spacing)]
    strides: list[list[int]] = []
    while len(strides) < MOST_LEVELS - 1:
        shortest = min(steps)
        halve = [size / 2 >= SMALLEST_LEVEL and step < 2 * shortest for size, step in zip(sizes, steps, strict=True)]
        if not any(halve):
            if len(strides) >= FEWEST_LEVELS - 1 or not any(size / 2 >= 2 for size in sizes):
                break
            halve = [size / 2 >= 2 for size in sizes]
        stride = tuple(2 if each else 1 for each in halve)
        sizes = [size / by for size, by in zip(sizes, stride, strict=True)]
        steps = [step * by for step, by in zip(steps, stride, strict=True)]
        strides.append(list(stride))
        kernels.append(_kernel(steps))
    while len(strides) < FEWEST_LEVELS - 1:
        strides.append([1, 1, 1])
        kernels.append([3, 3, 3])
    features = [min(MOST_FEATURES, FIRST_FEATURES * 2**level) for level in range(len(kernels))]
    x, y, z = (math.prod(stride[axis] for stride in strides) for axis in range(3))
    arguments = {"channels": features, "strides": strides, "kernels": kernels, "residual": False}
    return arguments | {"normalization": "instance"}, (x, y, z)


def _kernel(steps: Sequence[float]) -> list[int]:
    """Return 3 for every axis, and 1 along one whose voxels are at least twice as long as the shortest."""
    return [1 if step >= 2 * min(steps) else 3 for step in steps]


def _gates(
    draft: Plan, sites: Sequence[SiteFingerprint], section: dict[str, Any], reasons: dict[tuple[str, ...], str]
) -> None:
    lows = [each.fingerprint.get(f"volume_ml.{c.name}.p10") for c in draft.task.classes for each in sites]
    highs = [each.fingerprint.get(f"volume_ml.{c.name}.p90") for c in draft.task.classes for each in sites]
    low, high = [v for v in lows if v is not None and v > 0], [v for v in highs if v is not None and v > 0]
    if not low or not high:
        return
    section["gates"]["minimum_volume_ml"] = float(f"{min(low) / ROOM:.2g}")
    section["gates"]["maximum_volume_ml"] = float(f"{max(high) * ROOM:.2g}")
    reasons["pseudo_labels", "gates"] = (
        f"Volumes: structures have {min(low):g} to {max(high):g} ml (10th to 90th percentile), with room of {ROOM:g} "
        "times."
    )
    spread = max(math.log(h / lo) / 2.563 for lo, h in zip(lows, highs, strict=True) if lo and h)  # 80 % of a normal
    if draft.pseudo_labels is not None and draft.pseudo_labels.method == "evidence":
        tolerance = round(math.exp(spread), 2)
        section["sources"]["volume_tolerance"] = max(1.05, tolerance) if tolerance <= 2 else None
        reasons["pseudo_labels", "sources"] = (
            f"volume_tolerance: the standard deviation of the log volume is {spread:.2f}, so a factor of {tolerance:g}"
            + ("." if tolerance <= 2 else "; volumes that differ so much say nothing about one patient.")
        )
