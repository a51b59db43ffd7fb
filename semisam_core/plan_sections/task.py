"""The plan's task and data sections: structures, label values, channels, grid and intensities."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from semisam_core.configuration import Fraction, Name, Spacing, StrictModel

LabelValue = Annotated[int, Field(ge=1, le=255)]


class TargetClass(StrictModel):
    """One structure to segment: its value in label files, or the values of its parts.

    Attributes:
        name: its name in scores, reports and packages.
        value: its value in label files; or give `values`.
        values: two or more values that together mark it, kept in ascending order.
        connected: whether it is in one piece: of a segmentation, only the largest connected component is kept.
    """

    omitted_defaults = ("value", "values", "connected")

    name: Name
    value: LabelValue | None = None
    values: tuple[LabelValue, ...] | None = None
    connected: bool = False

    @field_validator("values")
    @classmethod
    def _ascending(cls, values: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if values is None:
            return None
        if len(values) < 2:
            raise ValueError("two or more values are expected; for a single one, write value: instead of values:")
        if len(set(values)) < len(values):
            raise ValueError("a value is listed twice")
        return tuple(sorted(values))

    @model_validator(mode="after")
    def _exactly_one(self) -> TargetClass:
        if (self.value is None) == (self.values is None):
            raise ValueError("give either value, or values for a structure that is the union of several")
        return self

    @property
    def label_values(self) -> tuple[int, ...]:
        """All values that mark this structure in label files."""
        return tuple(value for value in (self.value, *(self.values or ())) if value is not None)


class Task(StrictModel):
    """What is segmented, on what kind of scan.

    Attributes:
        name: the study's name.
        classes: the structures to segment; background is 0 in label files and not listed.
        channels: input channels, in order; with several, images are called `<case>_0000.nii.gz`, `<case>_0001.nii.gz`
            and so on.
        ignore_other_values: whether other whole numbers from 1 up in a label file are background, for files with more
            structures than the study needs. If not, a value that marks no class quarantines the case, because it may be
            the wrong file.
    """

    name: Name
    classes: tuple[TargetClass, ...] = Field(min_length=1, max_length=64)
    channels: tuple[Name, ...] = Field(min_length=1, max_length=8)
    ignore_other_values: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> Task:
        for what, values in (
            ("name", [c.name for c in self.classes]),
            ("value", [value for c in self.classes for value in c.label_values]),
            ("channel", list(self.channels)),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"every class {what} must differ from the others, found {values}")
        return self


class Intensity(StrictModel):
    """How intensities are normalised.

    Attributes:
        kind: `percentiles`: clip to the [lower, upper] percentiles of the scan, then zero mean and unit variance (MR).
            `window`: clip to [lower, upper] in the scan's own units, then scale to [0, 1] (CT in HU, PET in SUV).
        lower: lower bound, a percentile or in the scan's units.
        upper: upper bound, a percentile or in the scan's units.
    """

    kind: Literal["percentiles", "window"]
    lower: float
    upper: float

    @model_validator(mode="after")
    def _ordered(self) -> Intensity:
        if not self.lower < self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        if self.kind == "percentiles" and not (self.lower >= 0 and self.upper <= 100):
            raise ValueError("percentiles lie between 0 and 100")
        return self


class Data(StrictModel):
    """The specialist's grid: RAS orientation, this spacing, patches of this size.

    Attributes:
        spacing_mm: voxel size to which scans are resampled, each between 0.05 and 20 mm; predictions are resampled
            back.
        patch: sides of a training patch in voxels, each between 8 and 512 and a multiple of what the specialist needs.
        foreground_share: share of training patches that are centred on foreground.
        nan: what happens to a scan with NaN voxels: `refuse` quarantines it; `zero` sets them to 0 in the scan's own
            units, for scans whose background is NaN.
    """

    omitted_defaults = ("nan",)

    spacing_mm: Spacing
    intensity: Intensity
    patch: tuple[int, int, int]
    foreground_share: Fraction = 0.7
    nan: Literal["refuse", "zero"] = "refuse"

    @field_validator("patch")
    @classmethod
    def _positive_patch(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(8 <= side <= 512 for side in value):
            raise ValueError("each side of the patch is in voxels, between 8 and 512")
        return value
