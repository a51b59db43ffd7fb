"""What is plausible for a scan or a label, in sentences that `semisam data check` and `semisam site doctor` share."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from semisam_core.data.nifti import by_axis

VOXEL_MM = (0.05, 20.0)
CT_AIR_HU = -500.0
CT_HIGHEST_HU = 32_000.0
SUV_HIGHEST = 100.0
RINGING = 0.02
"""Negative values up to this share of the intensity range come from resampling and are no sign of a wrong scale."""

Modality = Literal["CT", "MR", "PET"]
_MR_WEIGHTED = frozenset({"t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "pd", "pdw", "flair"})
_WORDS: dict[Modality, frozenset[str]] = {
    "CT": frozenset({"ct", "cta", "cect", "ncct", "cbct", "hu"}),
    "PET": frozenset({"pet", "suv", "fdg", "psma"}),
    "MR": _MR_WEIGHTED | {"mr", "mri", "mra", "lge", "cine", "bssfp", "ssfp", "dwi", "adc", "dce", "swi", "tof"},
}


def modality_of(channel: str) -> Modality | None:
    """Return the modality that a channel's name says, or None.

    >>> modality_of("lge-mr"), modality_of("T1w"), modality_of("ct"), modality_of("image")
    ('MR', 'MR', 'CT', None)
    """
    words = set(re.split(r"[^a-z0-9]+", channel.lower()))
    named = [modality for modality, accepted in _WORDS.items() if words & accepted]
    return named[0] if len(named) == 1 else None


def implausible_spacing(spacing_mm: Sequence[float]) -> str | None:
    """Return what is wrong with a voxel size, or None."""
    if VOXEL_MM[0] <= min(spacing_mm) and max(spacing_mm) <= VOXEL_MM[1]:
        return None
    return f"its voxels are {by_axis(spacing_mm)} mm, which is implausible; check the unit."


def has_orientation(header: Any) -> bool:
    """Return whether a NIfTI header says how the patient lies."""
    return int(header["qform_code"]) != 0 or int(header["sform_code"]) != 0


NO_ORIENTATION = "its file has no orientation; export it with its geometry."
ONE_VALUE = "all voxels have the same value; the file may be empty."
EMPTY_LABEL = "its label is empty; if that is wrong, correct or exclude it."


def missing_classes(names: Sequence[str], expected: Collection[int], seen: Collection[int]) -> str | None:
    """Return which of the expected classes no label marks, or None.

    Args:
        names: the plan's classes.
        expected: classes (from 1) that the site says its labels mark.
        seen: classes that at least one label marks.
    """
    missing = [names[k - 1] for k in sorted(set(expected) - set(seen))]
    if not missing:
        return None
    return (
        f"no label marks {', '.join(missing)}; if that is never drawn here, list the other classes under "
        "data.labeled_classes; otherwise it is learned as background."
    )


def implausible_intensities(
    modality: Modality | None, minimum: float, maximum: float, highest: float, suv: bool
) -> list[str]:
    """Return what the intensities of a channel say against its modality.

    Args:
        modality: what the channel's name says.
        minimum: the smallest value.
        maximum: the largest value.
        highest: the 99.5th percentile.
        suv: whether PET is expected in SUV.
    """
    said = []
    if modality == "CT":
        if minimum > CT_AIR_HU:
            said.append(
                f"the smallest value is {minimum:.4g}, but CT in Hounsfield units reaches about -1000 in air. Were the "
                "rescale slope and intercept lost, or was the scan normalised or cropped inside the body?"
            )
        if maximum > CT_HIGHEST_HU:
            said.append(
                f"the largest value is {maximum:.4g}, beyond any Hounsfield unit. Is it an overflow or a marker?"
            )
    elif modality is not None and minimum < -RINGING * max(highest - minimum, 0.0):
        kind = "MR magnitudes are" if modality == "MR" else "PET uptake is"
        said.append(
            f"the smallest value is {minimum:.4g}, but {kind} not negative. Was the scan normalised, or was an "
            "unsigned file read as signed?"
        )
    if modality == "PET" and suv and highest > SUV_HIGHEST:
        said.append(f"the 99.5th percentile is {highest:.4g}, too high for SUV. Is the scan in Bq/ml?")
    return said
