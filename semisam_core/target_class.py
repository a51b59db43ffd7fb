"""One structure to segment, and how label files mark it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from semisam_core.configuration import Name, StrictModel

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
