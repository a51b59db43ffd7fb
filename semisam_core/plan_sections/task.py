"""The plan's sections on the task and its data: structures, label values, channels, grid and intensities."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from semisam_core.configuration import Fraction, Name, Spacing, StrictModel

LabelValue = Annotated[int, Field(ge=1, le=255)]


class TargetClass(StrictModel):
    """One structure to segment, and the value that marks it in label files, or the values of the parts it unites.

    One class has one form: `value`, or two `values` or more, kept in ascending order; the other key is left out where
    the plan is written. So equal plans have equal hashes, and `values` changed none of those that do not use it.

    `connected` says that the structure is one piece: of a segmentation only its largest connected component is kept.
    It, too, is written only where it is used.
    """

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
            raise ValueError(
                "these are two values or more; a structure with a single one has value: in place of values:"
            )
        if len(set(values)) < len(values):
            raise ValueError("each value is named once")
        return tuple(sorted(values))

    @model_validator(mode="after")
    def _exactly_one(self) -> TargetClass:
        if (self.value is None) == (self.values is None):
            raise ValueError("give either value, or values where the structure is the union of several")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: each for key, each in serialize(self).items() if each is not None and each is not False}

    @property
    def label_values(self) -> tuple[int, ...]:
        """All values that mark this structure in label files."""
        return tuple(value for value in (self.value, *(self.values or ())) if value is not None)


class Task(StrictModel):
    """What is segmented on what kind of scan.

    A label value that marks no class quarantines the case, since it may be the wrong file; with `ignore_other_values`
    whole numbers from 1 on are background instead, for label files that hold more structures than the study's.
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
    """How intensities are made comparable.

    `percentiles`: clip to the [lower, upper] percentiles of the scan, then zero mean and unit variance (MR).
    `window`: clip to [lower, upper] in the scan's own units, then scale to [0, 1] (CT in HU, PET in SUV).
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
    """The grid on which the specialist sees scans: RAS orientation, this spacing, patches of this size.

    `nan` says what happens to a scan with NaN voxels: `refuse` quarantines it; `zero` sets them to 0 in the scan's own
    units, for scans whose background is NaN. `nan` is written only where it is `zero`, so that plans without it keep
    their hashes.
    """

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

    @model_serializer(mode="wrap")
    def _without_default_nan(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: each for key, each in serialize(self).items() if (key, each) != ("nan", "refuse")}
