"""The checks across cases. A new one is a function and a line in `SITE_CHECKS`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from intake.check.alike import FEWEST, NEAR, near_pairs, outliers, sharing
from intake.check.facts import CaseFacts, Terms
from intake.check.findings import Severity, Site, SiteCheck
from intake.check.patients import by_patient, name_groups
from intake.check.plausibility import missing_classes
from semisam_core.data.cases import Role
from semisam_core.data.geometry import Geometry, axis_change
from semisam_core.data.nifti import by_axis

RELATIVE_FLOOR = 0.05
"""Least spread, as a logarithm: cases within a factor of 1.5 of the median are never outliers."""
RARE = 0.1
MANY = 0.1
"""Share of cases beyond which odd ones are a group rather than exceptions."""
PROBLEM, WARNING = Severity.PROBLEM, Severity.WARNING
Found = Iterator[tuple[str | None, str]]


def same_scan(site: Site, terms: Terms) -> Found:
    """One scan under two names, both for training or both for validation."""
    for group in _same_contents(site.cases):
        if not _crosses(group, site.cases):
            yield group[0], f"{', '.join(group)} are the same scan under several names; exclude all but one."


def leak_by_content(site: Site, terms: Terms) -> Found:
    """One scan for training and for validation."""
    for group in _same_contents(site.cases):
        if _crosses(group, site.cases):
            yield (
                group[0],
                f"{', '.join(group)} are the same scan, and it is used for both training and validation: scores would "
                "be too good. Exclude all but one.",
            )


def leak_by_patient(site: Site, terms: Terms) -> Found:
    """One patient in training and in validation, as the import wrote down."""
    for group in by_patient([case.id for case in site.cases], site.patients).values():
        if len(group) > 1 and _crosses(group, site.cases):
            yield (
                group[0],
                f"{', '.join(group)} are of one patient (manifest.json), who is used for both training and validation: "
                "scores would be too good. Move them to one side.",
            )


def leak_by_name(site: Site, terms: Terms) -> Found:
    """Names that suggest one patient in training and in validation."""
    unknown = [case.id for case in site.cases if case.id not in site.patients]
    for common, group in name_groups(unknown).items():
        if _crosses(group, site.cases):
            yield (
                group[0],
                f"{', '.join(group)} are all named {common}..., and are used for both training and validation. If that "
                "is one patient, move them to one side.",
            )


def near_copies(site: Site, terms: Terms) -> Found:
    """Scans that look the same when small: a re-exported, rescaled or slightly changed copy."""
    scans = [case for case in site.cases if case.channels]
    exact = {frozenset(pair) for group in _same_contents(scans) for pair in _pairs(group)}
    for first, second, match in near_pairs([case.id for case in scans], [case.channels[0].miniature for case in scans]):
        if {first, second} not in exact:
            yield (
                first,
                f"{first} and {second} look the same (correlation {match:.4f} of 8 x 8 x 8 block means). If one is a "
                "copy of the other, exclude it.",
            )


def same_label(site: Site, terms: Terms) -> Found:
    """One label under two names, of scans that differ."""
    marked = {case.id: (case.label.content,) for case in site.cases if case.label is not None and case.label.classes}
    scans = {frozenset(pair) for group in _same_contents(site.cases) for pair in _pairs(group)}
    for group in sharing(marked):
        if not {frozenset(pair) for pair in _pairs(group)} <= scans:
            yield group[0], f"the labels of {', '.join(group)} are the same voxel for voxel, but their scans are not."


def same_channel(site: Site, terms: Terms) -> Found:
    """Two channels of a case with the same voxels."""
    for case in site.cases:
        for group in sharing({channel.name: channel.contents for channel in case.channels}):
            yield case.id, f"its channels {', '.join(group)} are the same voxel for voxel."


def odd_axes(site: Site, terms: Terms) -> Found:
    """A file stored along other axes than most."""
    axes = {case.id: case.channels[0].geometry.axes for case in site.cases if case.channels}
    if not axes:
        return
    usual, count = Counter(axes.values()).most_common(1)[0]
    for name, found in axes.items():
        if found != usual and count > len(axes) / 2:
            yield (
                name,
                f"it is stored along the axes {found}, most cases along {usual}. Was it exported in another way?",
            )


def odd_spacing(site: Site, terms: Terms) -> Found:
    """A voxel size apart from the others'."""
    yield from _odd_by_axis(
        site,
        "voxel sizes",
        "mm",
        lambda geometry: [math.log(side) for side in geometry.spacing_mm],
        lambda geometry: geometry.spacing_mm,
    )


def odd_shape(site: Site, terms: Terms) -> Found:
    """A number of voxels apart from the others'."""
    yield from _odd_by_axis(
        site,
        "shapes",
        "voxels",
        lambda geometry: [math.log(side) for side in geometry.shape],
        lambda geometry: geometry.shape,
    )


def odd_intensities(site: Site, terms: Terms) -> Found:
    """Intensities apart from the others' of the same channel."""
    for name in terms.channels:
        known = [
            (case.id, channel.intensities)
            for case in site.cases
            for channel in case.channels
            if channel.name == name and channel.intensities is not None and channel.intensities.width > 0
        ]
        if not known:
            continue
        width = outliers([math.log(found.width) for _, found in known], RELATIVE_FLOOR)
        typical = sorted(found.width for _, found in known)[len(known) // 2]
        middle = outliers([found.percentiles[2] / typical for _, found in known], RELATIVE_FLOOR)
        odd = [
            (
                case,
                f"{name} reaches from {found.percentiles[0]:.4g} to {found.percentiles[4]:.4g} (0.5th to 99.5th "
                f"percentile; median {found.percentiles[2]:.4g}), unlike most cases. Another scanner or protocol?",
            )
            for (case, found), is_odd in zip(known, width | middle, strict=True)
            if is_odd
        ]
        yield from _few_or_one(odd, len(known), f"the intensities of {name}")


def odd_volume(site: Site, terms: Terms) -> Found:
    """A structure much larger or smaller than in other labels."""
    for name, volumes in volumes_by_class(site.cases).items():
        typical = sorted(volumes.values())[len(volumes) // 2]
        is_odd = outliers([math.log(volume) for volume in volumes.values()], RELATIVE_FLOOR)
        odd = [
            (case, f"{name} measures {volume:.3g} ml, in most labels about {typical:.3g} ml.")
            for (case, volume), apart in zip(volumes.items(), is_odd, strict=True)
            if apart
        ]
        yield from _few_or_one(odd, len(volumes), f"the volumes of {name}")


def unmarked_class(site: Site, terms: Terms) -> Found:
    """A class that no label marks, or no validation label."""
    if terms.plan is None or not any(case.label is not None for case in site.cases):
        return
    names = terms.plan.class_names
    seen = {each.index for case in site.cases if case.label is not None for each in case.label.classes}
    if said := missing_classes(names, terms.annotated, seen):
        yield None, said
    scored = [case.label for case in site.cases if case.role is Role.VALIDATION and case.label is not None]
    missing = seen & set(terms.annotated) - {each.index for label in scored for each in label.classes}
    if scored and missing:
        yield (
            None,
            f"no validation label marks {', '.join(names[k - 1] for k in sorted(missing))}, so it is not scored.",
        )


def rare_class(site: Site, terms: Terms) -> Found:
    """A class that few labels mark."""
    labels = [case for case in site.cases if case.label is not None]
    for name, volumes in volumes_by_class(site.cases).items():
        if len(volumes) <= RARE * len(labels):
            yield None, f"only {len(volumes)} of {len(labels)} labels mark {name} ({', '.join(sorted(volumes))})."


def nothing_labeled(site: Site, terms: Terms) -> Found:
    """No label to train on."""
    if not any(case.role is Role.LABELED and case.has_label for case in site.cases):
        yield None, "no case is labeled; if experts drew any, list them under data.labeled."


def nothing_usable(site: Site, terms: Terms) -> Found:
    """No scan that could be read."""
    if not any(case.channels and not case.unreadable for case in site.cases):
        yield None, "no case can be read."


def volumes_by_class(cases: Sequence[CaseFacts]) -> dict[str, dict[str, float]]:
    """Return the volume in ml of each class in each label that marks it, by the class's name and the case."""
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        for each in case.label.classes if case.label is not None else ():
            found.setdefault(each.name, {})[case.id] = each.volume_ml
    return found


def _same_contents(cases: Sequence[CaseFacts]) -> list[list[str]]:
    """Return groups of cases whose first channels are the same scan; constant images are all alike and do not count."""
    return sharing({case.id: case.channels[0].contents for case in cases if case.channels and _varies(case)})


def _varies(case: CaseFacts) -> bool:
    found = case.channels[0].intensities
    return found is not None and found.minimum < found.maximum


def _crosses(group: Sequence[str], cases: Sequence[CaseFacts]) -> bool:
    roles = {case.role is Role.VALIDATION for case in cases if case.id in group}
    return len(roles) == 2


def _pairs(group: Sequence[str]) -> list[tuple[str, str]]:
    return [(first, second) for k, first in enumerate(group) for second in group[k + 1 :]]


def _odd_by_axis(
    site: Site,
    what: str,
    unit: str,
    measured: Callable[[Geometry], list[float]],
    said: Callable[[Geometry], Sequence[float]],
) -> Found:
    """Look for outliers along the patient's axes, and name each case once."""
    turned = {case.id: along_patient(case.channels[0].geometry) for case in site.cases if case.channels}
    if not turned:
        return
    values = [measured(geometry) for geometry in turned.values()]
    odd = [outliers([value[axis] for value in values], RELATIVE_FLOOR) for axis in range(3)]
    middle = [math.exp(sorted(value[axis] for value in values)[len(values) // 2]) for axis in range(3)]
    apart = [
        (
            case,
            f"from left to right, back to front and bottom to top it has {by_axis(said(geometry))} {unit}; the median "
            f"is {by_axis(middle)}.",
        )
        for (case, geometry), *is_odd in zip(turned.items(), *odd, strict=True)
        if any(is_odd)
    ]
    yield from _few_or_one(apart, len(turned), f"the {what}")


def _few_or_one(odd: Sequence[tuple[str, str]], cases: int, what: str) -> Found:
    """Name each odd case, or say once that cases fall into groups if too many are odd to be exceptions."""
    if len(odd) <= max(1, MANY * cases):
        yield from odd
        return
    named = ", ".join(name for name, _ in odd[:5]) + (", ..." if len(odd) > 5 else "")
    yield (
        None,
        f"{what} differ widely: {len(odd)} of {cases} cases lie far from the median ({named}). Do they come from "
        "several scanners, protocols or scales? The charts show them.",
    )


def along_patient(geometry: Geometry) -> Geometry:
    """Return the geometry with its axes closest to R, A, S."""
    target = Geometry(geometry.shape, torch.eye(4, dtype=torch.float64))
    return axis_change(geometry, target).geometry(geometry)


SITE_CHECKS = (
    SiteCheck("usable", PROBLEM, "at least one case that can be read", nothing_usable),
    SiteCheck("leak-content", PROBLEM, "no scan in both training and validation", leak_by_content),
    SiteCheck("leak-patient", PROBLEM, "no patient in both training and validation", leak_by_patient),
    SiteCheck("leak-name", WARNING, "no patient in both training and validation", leak_by_name),
    SiteCheck("duplicate", WARNING, "each scan once", same_scan),
    SiteCheck("near-duplicate", WARNING, f"miniatures that correlate with less than {NEAR:g}", near_copies),
    SiteCheck("duplicate-label", WARNING, "each scan with a label of its own", same_label),
    SiteCheck("duplicate-channel", WARNING, "channels that differ", same_channel),
    SiteCheck("labeled", WARNING, "some labeled cases", nothing_labeled),
    SiteCheck(
        "classes",
        WARNING,
        "each class in at least one label, and in one for validation",
        unmarked_class,
        needs_plan=True,
    ),
    SiteCheck("rare-class", WARNING, f"each class in more than {RARE:.0%} of the labels", rare_class, fewest=FEWEST),
    SiteCheck("stored-axes", WARNING, "files stored along the same axes", odd_axes, fewest=FEWEST),
    SiteCheck("spacing-outlier", WARNING, "a voxel size like that of the other cases", odd_spacing, fewest=FEWEST),
    SiteCheck("shape-outlier", WARNING, "a shape like that of the other cases", odd_shape, fewest=FEWEST),
    SiteCheck(
        "intensity-outlier", WARNING, "intensities like those of the other cases", odd_intensities, fewest=FEWEST
    ),
    SiteCheck("volume-outlier", WARNING, "structures about as large as in the other labels", odd_volume, fewest=FEWEST),
)
