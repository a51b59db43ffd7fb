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
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan
from semisam_core.specialists import memory_estimate

ANISOTROPIC = 3.0  # an axis with voxels this much longer than the others'
LONGEST_VOXEL_MM = 20.0  # that a plan may have
SMALLEST_LEVEL = 4  # voxels; an axis is not halved below
ALONE = 3 * SMALLEST_LEVEL  # voxels that an axis needs to be the only one that is halved
MOST_LEVELS, FEWEST_LEVELS = 6, 3
FIRST_FEATURES, MOST_FEATURES = 16, 320
LARGEST_SIDE, SMALLEST_SIDE = 256, 16
HALVINGS = 6  # of the range of patch sizes, until it is narrow enough
ROOM = 3.0  # gates lie this far outside of the volumes that sites have

CENTRAL_80 = 2.563  # standard deviations of a normal distribution between its 10th and 90th percentile
SMALLEST_TOLERANCE, LARGEST_TOLERANCE = 1.05, 2.0

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

    Raises:
        ConfigError: the memory is too small for the smallest patch.
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
    medians = [_median(sites, f"spacing_mm.{axis}.median") for axis in AXES]
    chosen = list(medians)
    reason = "The median of the sites' medians, each weighted by its patients."
    long = max(range(3), key=lambda k: medians[k])
    others = [medians[k] for k in range(3) if k != long]
    if medians[long] / max(others) > ANISOTROPIC:
        fine = _median(sites, f"spacing_mm.{AXES[long]}.p10")
        chosen[long] = max(fine, max(others))
        times = medians[long] / max(others)
        reason += f" {AXES[long]}: the 10th percentile, since voxels there are {times:.1f} times longer."
    by_site = "; ".join(
        f"{each.site} " + " x ".join(f"{each.fingerprint[f'spacing_mm.{axis}.median']:g}" for axis in AXES)
        for each in sites
    )
    reasons["data", "spacing_mm"] = f"{reason} Medians by site: {by_site}."
    x, y, z = (round(min(side, LONGEST_VOXEL_MM), 3) for side in chosen)
    return x, y, z


def _median(sites: Sequence[SiteFingerprint], name: str) -> float:
    """Return the median of a number that every usable fingerprint has."""
    found = weighted_median(sites, name)
    assert found is not None, name
    return found


def _shape(sites: Sequence[SiteFingerprint], spacing: tuple[float, float, float]) -> Triple:
    sides = [
        max(SMALLEST_SIDE, round(_median(sites, f"extent_mm.{axis}.median") / step))
        for axis, step in zip(AXES, spacing, strict=True)
    ]
    return sides[0], sides[1], sides[2]


def _intensity(draft: Plan, sites: Sequence[SiteFingerprint], reasons: dict[tuple[str, ...], str]) -> dict[str, Any]:
    channels = draft.task.channels
    ct = len(channels) == 1 and is_ct(channels[0])
    for where, sentence in (
        ("foreground", "CT: the 0.5 and 99.5 percentiles inside the labels, as medians over patients."),
        ("intensity", "CT, but no site has enough labels: the 0.5 and 99.5 percentiles of whole scans, a wide window."),
    ):
        low, high = (weighted_median(sites, f"{where}.{channels[0]}.{which}") for which in ("p0_5", "p99_5"))
        if ct and low is not None and high is not None and low < high:
            reasons["data", "intensity"] = sentence
            return {"kind": "window", "lower": float(f"{low:.3g}"), "upper": float(f"{high:.3g}")}
    reasons["data", "intensity"] = (
        "CT whose values do not differ at all sites: each scan is normalised by itself."
        if ct
        else "Intensities have no unit across scanners or channels: each scan is normalised by itself."
    )
    return {"kind": "percentiles", "lower": 0.5, "upper": 99.5}


def _network(
    draft: Plan, shape: Triple, spacing: tuple[float, float, float], budget: float
) -> tuple[Triple, dict[str, Any]]:
    """Return the patch and the network's arguments: the largest of the scan's proportions that the budget allows.

    Raises:
        ConfigError: the budget does not allow the smallest patch.
    """
    batch = max(1, draft.training.labeled_batch + draft.training.unlabeled_batch)
    channels, classes = len(draft.task.channels), len(draft.task.classes)

    def sized(share: float) -> tuple[Triple, dict[str, Any]]:
        wanted = [max(float(SMALLEST_SIDE), share * min(LARGEST_SIDE, side)) for side in shape]
        arguments, divisor = network_levels(wanted, spacing)
        x, y, z = (
            max(d * 2 if d > 1 else SMALLEST_SIDE, round(w / d) * d) for w, d in zip(wanted, divisor, strict=True)
        )
        return (x, y, z), arguments

    def needed(patch: Triple, arguments: dict[str, Any]) -> int:
        return memory_estimate("dynunet", arguments, channels, classes, patch, batch)

    if needed(*(whole := sized(1.0))) <= budget:
        return whole
    best, low, high = sized(0.0), 0.0, 1.0
    if (least := needed(*best)) > budget:
        patch = " x ".join(str(side) for side in best[0])
        raise ConfigError(
            f"--memory-gb {budget / 1e9:g} is too little: a training step on {batch} of the smallest patches ({patch} "
            f"voxels) takes {least / 1e9:.2g} GB."
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if needed(*(tried := sized(middle))) <= budget:
            best, low = tried, middle
        else:
            high = middle
    return best


def network_levels(patch: Sequence[float], spacing: Sequence[float]) -> tuple[dict[str, Any], Triple]:
    """Return the network's arguments for a patch, and what its sides must be divisible by.

    Axes that are long enough are halved together if their voxels differ by less than a factor of 2. A kernel is 1 along
    an axis until its voxels are within that factor of the shortest, then stays 3, also at the deepest level.
    """
    sizes, steps, kernel = list(patch), list(spacing), [1, 1, 1]
    strides: list[list[int]] = []
    kernels: list[list[int]] = []
    while len(strides) < MOST_LEVELS - 1:
        long = [axis for axis in range(3) if sizes[axis] >= 2 * SMALLEST_LEVEL]
        halved = [axis for axis in long if steps[axis] < 2 * min(steps[each] for each in long)]
        if not halved or (len(halved) == 1 and sizes[halved[0]] < ALONE):
            break
        kernel = [3 if step < 2 * min(steps) else before for step, before in zip(steps, kernel, strict=True)]
        kernels.append(kernel)
        strides.append([2 if axis in halved else 1 for axis in range(3)])
        sizes = [size / by for size, by in zip(sizes, strides[-1], strict=True)]
        steps = [step * by for step, by in zip(steps, strides[-1], strict=True)]
    while len(strides) < FEWEST_LEVELS - 1:
        strides.append([1, 1, 1])
        kernels.append([3, 3, 3])
    kernels.append([3, 3, 3])
    features = [min(MOST_FEATURES, FIRST_FEATURES * 2**level) for level in range(len(kernels))]
    x, y, z = (math.prod(stride[axis] for stride in strides) for axis in range(3))
    arguments = {"channels": features, "strides": strides, "kernels": kernels, "residual": False}
    return arguments | {"normalization": "instance"}, (x, y, z)


def _gates(
    draft: Plan, sites: Sequence[SiteFingerprint], section: dict[str, Any], reasons: dict[tuple[str, ...], str]
) -> None:
    """Set the volumes that pseudo-labels may have, for all classes at all sites."""
    ranges = [
        (each.fingerprint[f"volume_ml.{target.name}.p10"], each.fingerprint[f"volume_ml.{target.name}.p90"])
        for target in draft.task.classes
        for each in sites
        if each.fingerprint.get(f"volume_ml.{target.name}.p90", 0) > 0
    ]
    if not ranges:
        return
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    section["gates"]["minimum_volume_ml"] = float(f"{low / ROOM:.2g}")
    section["gates"]["maximum_volume_ml"] = float(f"{high * ROOM:.2g}")
    reasons["pseudo_labels", "gates"] = (
        f"Volumes: structures have {low:g} to {high:g} ml (10th to 90th percentile), with room of {ROOM:g} times."
    )
    if draft.pseudo_labels is None or draft.pseudo_labels.method != "evidence":
        return
    spread = max(math.log(high / low) / CENTRAL_80 if low > 0 else math.inf for low, high in ranges)
    factor = max(SMALLEST_TOLERANCE, round(math.exp(spread), 2))
    sources = section.setdefault("sources", {})  # left out by a draft that has all its defaults
    sources["volume_tolerance"] = factor if factor <= LARGEST_TOLERANCE else None
    reasons["pseudo_labels", "sources"] = (
        f"volume_tolerance: the standard deviation of the log volume is at most {spread:.2f} at any site."
        if factor <= LARGEST_TOLERANCE
        else "volume_tolerance: volumes differ so much between patients that they say nothing about one of them."
    )
