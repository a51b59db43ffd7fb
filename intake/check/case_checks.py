"""The checks of one case. A new one is a function and a line in `CASE_CHECKS`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from intake.check.facts import CaseFacts, ClassFacts, Terms
from intake.check.findings import CaseCheck, Severity
from intake.check.plausibility import (
    EMPTY_LABEL,
    NO_ORIENTATION,
    ONE_VALUE,
    VOXEL_MM,
    implausible_intensities,
    implausible_spacing,
    modality_of,
)
from semisam_core.data.geometry import CORNER_TOLERANCE_VOXELS, Geometry
from semisam_core.data.labels import ROUNDING_TOLERANCE

OBLIQUE_DEGREES = 15.0
SHEAR_DEGREES = 0.5
SPECK_ML, SPECK_SHARE = 0.1, 0.01
OUTSIDE_SHARE = 0.1
PROBLEM, WARNING = Severity.PROBLEM, Severity.WARNING


def unreadable(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A file is damaged, no 3D volume, or not NIfTI."""
    yield from case.unreadable


def too_large(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """The image would not fit into memory, as stored or on the plan's grid."""
    if case.too_large is not None:
        yield case.too_large


def channels_apart(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A channel has another grid than the first."""
    yield from case.off_grid


def label_apart(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """The label has another shape, place or direction than the image."""
    if case.label is not None and case.label.off_grid is not None:
        yield case.label.off_grid


def not_finite(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """NaN or infinite voxels, except NaN in the background where the plan sets it to zero."""
    zeroed = terms.plan is not None and terms.plan.data.nan == "zero"
    for channel in case.channels:
        found = channel.intensities
        if found is None:
            yield f"every voxel of {channel.name} is NaN or infinite."
        elif found.infinite or (found.nan and not zeroed):
            yield f"{channel.name} has {found.nan} NaN and {found.infinite} infinite voxels."
        elif found.nan_in_label:
            yield f"{channel.name} is NaN at {found.nan_in_label} voxels that the label marks."


def background_nan(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """NaN in the background, which the plan sets to zero."""
    if terms.plan is None or terms.plan.data.nan != "zero":
        return
    for channel in case.channels:
        if (found := channel.intensities) is not None and found.nan and not (found.infinite or found.nan_in_label):
            yield f"{found.nan} NaN voxels of {channel.name} will be set to 0, as the plan's data.nan says."


def one_value(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A channel is constant."""
    for channel in case.channels:
        if (found := channel.intensities) is not None and found.minimum == found.maximum:
            yield f"{channel.name}: {ONE_VALUE}"


def nearly_one_value(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """Almost all voxels of a channel are equal."""
    for channel in case.channels:
        found = channel.intensities
        if found is not None and found.minimum < found.maximum and found.width == 0.0:
            yield f"{channel.name}: 99% of its voxels have the value {found.percentiles[2]:g}; it may be nearly empty."


def outside_window(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """The plan's window would clip a channel to one value."""
    if terms.plan is None or terms.plan.data.intensity.kind != "window":
        return
    low, high = terms.plan.data.intensity.lower, terms.plan.data.intensity.upper
    for channel in case.channels:
        found = channel.intensities
        if found is not None and (found.percentiles[4] <= low or found.percentiles[0] >= high):
            yield (
                f"99% of {channel.name} lies outside of the plan's window {low:g} to {high:g} (it reaches from "
                f"{found.percentiles[0]:.4g} to {found.percentiles[4]:.4g}), so nothing of it would be left."
            )


def spacing(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """An implausible voxel size."""
    for said in dict.fromkeys(implausible_spacing(channel.geometry.spacing_mm) for channel in case.channels):
        if said is not None:
            yield said


def orientation(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """The header does not say how the patient lies."""
    if any(not channel.has_orientation for channel in case.channels):
        yield NO_ORIENTATION


def oblique(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """The axes of the file are far from the patient's."""
    if case.channels and (angle := obliquity_degrees(case.channels[0].geometry)) > OBLIQUE_DEGREES:
        yield (
            f"its axes are turned by up to {angle:.0f} degrees against the patient's, so bringing it to the plan's "
            "grid blurs it and adds empty corners."
        )


def sheared(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """The axes of the file are not at right angles."""
    if case.channels and (angle := shear_degrees(case.channels[0].geometry)) > SHEAR_DEGREES:
        yield f"its axes are up to {angle:.1f} degrees off a right angle; was the gantry tilted?"


def converted(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """What was converted or rounded when files were opened."""
    notes = [note for channel in case.channels for note in channel.notes]
    for note in dict.fromkeys([*notes, *(case.label.notes if case.label is not None else ())]):
        yield f"{note}."


def modality(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """Intensities that the modality in a channel's name does not have."""
    suv = terms.plan is not None and terms.plan.data.intensity.kind == "window"
    for channel in case.channels:
        if (found := channel.intensities) is not None:
            kind = modality_of(channel.name)
            for said in implausible_intensities(kind, found.minimum, found.maximum, found.percentiles[4], suv):
                yield f"{channel.name}: {said}"


def label_not_whole(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A label with values between whole numbers, below 0, or NaN."""
    if case.label is not None and case.label.not_whole:
        shown = ", ".join(f"{value:g}" for value in case.label.not_whole[:5])
        more = ", ..." if len(case.label.not_whole) > 5 else ""
        yield (
            f"the label has the values {shown}{more}. Values between whole numbers come from interpolation: resample "
            "labels with nearest neighbour."
        )


def label_foreign(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A label value that marks no class of the plan."""
    if case.label is not None and case.label.foreign is not None:
        yield case.label.foreign


def label_empty(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A label that marks nothing."""
    if case.label is not None and all(value == 0 for value in case.label.values):
        yield EMPTY_LABEL


def label_unlisted(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A label that marks a class which the site's YAML does not list."""
    if case.label is None or terms.plan is None:
        return
    names = [each.name for each in case.label.classes if each.index not in terms.annotated]
    if names:
        yield f"the label marks {', '.join(names)}, which data.labeled_classes does not list; that part is ignored."


def specks(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """Tiny pieces of a structure apart from the rest of it."""
    said = []
    for each in _on_image(case):
        limit = min(SPECK_ML, SPECK_SHARE * each.components_ml[0])
        tiny = sum(volume <= limit for volume in each.components_ml)
        if tiny:
            said.append(f"{tiny} of {len(each.components_ml)} pieces of {each.name} measure at most {limit:.2g} ml")
    if said:
        yield f"{'; '.join(said)}. Are they slips of the brush?"


def outside_body(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A structure outside of the patient."""
    for each in case.label.classes if case.label is not None else ():
        if each.outside_body is not None and each.outside_body > OUTSIDE_SHARE:
            yield (
                f"{each.outside_body:.0%} of {each.name} lies outside of the body. Does the label belong to this scan, "
                "or is it flipped?"
            )


def at_border(case: CaseFacts, terms: Terms) -> Iterator[str]:
    """A structure that may be cut off by the end of the volume."""
    cut = [f"{each.name} ({', '.join(each.touches)})" for each in _on_image(case) if each.touches]
    if cut:
        yield f"the label reaches the end of the volume, so a structure may be cut off: {', '.join(cut)}."


def _on_image(case: CaseFacts) -> tuple[ClassFacts, ...]:
    """Return what the label marks, if it lies on the image."""
    return case.label.classes if case.label is not None and case.label.off_grid is None else ()


def obliquity_degrees(geometry: Geometry) -> float:
    """Return the largest angle between an axis of the array and the patient's axis closest to it."""
    cosines = geometry.affine.numpy()[:3, :3] / np.array(geometry.spacing_mm)
    return float(np.degrees(np.arccos(np.clip(np.abs(cosines).max(axis=0), 0.0, 1.0))).max())


def shear_degrees(geometry: Geometry) -> float:
    """Return how far the axes of the array are from right angles, at most."""
    cosines = geometry.affine.numpy()[:3, :3] / np.array(geometry.spacing_mm)
    between = np.abs(cosines.T @ cosines)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(np.clip(between, 0.0, 1.0))).max())


CASE_CHECKS = (
    CaseCheck("readable", PROBLEM, "a 3D NIfTI volume of one real number a voxel, one file per channel", unreadable),
    CaseCheck("size", PROBLEM, "an image within storage.memory_gb, as stored and on the plan's grid", too_large),
    CaseCheck(
        "channels-grid",
        PROBLEM,
        f"channels of one shape, corners within {CORNER_TOLERANCE_VOXELS:g} voxels",
        channels_apart,
    ),
    CaseCheck(
        "label-grid",
        PROBLEM,
        f"a label of the image's shape, corners within {CORNER_TOLERANCE_VOXELS:g} voxels",
        label_apart,
    ),
    CaseCheck("finite", PROBLEM, "finite voxels; NaN in the background if the plan says data.nan: zero", not_finite),
    CaseCheck("constant", PROBLEM, "an image with more than one value", one_value),
    CaseCheck("window", PROBLEM, "intensities inside the plan's window", outside_window, needs_plan=True),
    CaseCheck("label-whole", PROBLEM, f"whole numbers from 0 up (within {ROUNDING_TOLERANCE:g})", label_not_whole),
    CaseCheck("label-values", PROBLEM, "0 and the values of the plan's classes", label_foreign, needs_plan=True),
    CaseCheck("background-nan", WARNING, "an image without NaN", background_nan, needs_plan=True),
    CaseCheck("nearly-constant", WARNING, "an image whose 0.5th and 99.5th percentiles differ", nearly_one_value),
    CaseCheck("spacing", WARNING, f"voxels of {VOXEL_MM[0]:g} to {VOXEL_MM[1]:g} mm", spacing),
    CaseCheck("orientation", WARNING, "a header with a qform or an sform", orientation),
    CaseCheck("oblique", WARNING, f"axes within {OBLIQUE_DEGREES:g} degrees of the patient's", oblique),
    CaseCheck("sheared", WARNING, f"axes at right angles (within {SHEAR_DEGREES:g} degrees)", sheared),
    CaseCheck("converted", WARNING, "sizes in millimetres, label values stored as whole numbers", converted),
    CaseCheck("modality", WARNING, "CT in HU, MR magnitudes and PET uptake from 0 up", modality, needs_plan=True),
    CaseCheck("label-empty", WARNING, "a label that marks something", label_empty),
    CaseCheck(
        "label-unlisted", WARNING, "labels of the classes in data.labeled_classes", label_unlisted, needs_plan=True
    ),
    CaseCheck("label-specks", WARNING, f"pieces over {SPECK_ML:g} ml or over {SPECK_SHARE:.0%} of the largest", specks),
    CaseCheck(
        "label-in-body",
        WARNING,
        f"at most {OUTSIDE_SHARE:.0%} of a structure outside of the body",
        outside_body,
        needs_plan=True,
    ),
    CaseCheck("label-at-border", WARNING, "structures that end inside the volume", at_border),
)
