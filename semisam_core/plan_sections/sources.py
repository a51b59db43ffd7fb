"""The plan's sources of evidence for pseudo-labels: which there are, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from semisam_core.configuration import StrictModel
from semisam_core.generalists.base import GeneralistCard
from semisam_core.generalists.registry import generalist_names, generalist_spec
from semisam_core.sources.registry import source_builder

Anatomical = Literal["axial", "coronal", "sagittal"]


def _with_features(value: str, accepts: Callable[[GeneralistCard], bool], words: str) -> str:
    if not accepts(generalist_spec(value).card):
        able = [name for name in generalist_names() if accepts(generalist_spec(name).card)]
        raise ValueError(f"the embeddings of {value} are not feature maps{words}; accepted are {', '.join(able)}")
    return value


class FeatureHeadSettings(StrictModel):
    """A small network on a generalist's features that sites with labels train and the server averages.

    On a slice-wise generalist it has a part for each of `prompting.planes`, on a 3D one a single part for the volume;
    see `sources/feature_head.py`.

    Attributes:
        generalist: whose features it reads; one of `pseudo_labels.generalists` with feature maps.
        reduced_channels: channels to which the features are reduced first.
        hidden_channels: channels of its hidden layer.
        steps_per_round: optimizer steps per round, for each part.
        batch: slices or cubes per step.
        learning_rate: learning rate.
        rounds: it is trained in the study's first so many rounds and used in all; null for all.
    """

    generalist: str
    reduced_channels: int = Field(default=48, ge=1, le=1024)
    hidden_channels: int = Field(default=32, ge=1, le=1024)
    steps_per_round: int = Field(default=20, ge=1, le=10_000)
    batch: int = Field(default=8, ge=1, le=256)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    rounds: int | None = Field(default=None, ge=1)

    @field_validator("generalist")
    @classmethod
    def _has_feature_maps(cls, value: str) -> str:
        return _with_features(value, lambda card: card.feature_channels > 0, "")


class Prototypes(StrictModel):
    """Prototypes of each class in a generalist's features, in one plane; see `pseudo_labels/cold_start.py`.

    Attributes:
        generalist: whose features are compared; one of `pseudo_labels.generalists` with feature maps of slices.
        plane: plane of the slices.
        foreground_prototypes: prototypes of each class.
        background_prototypes: prototypes of the background.
        position_weight: how much the position in the scan counts beside the features; 0 if scans show different parts
            of the body.
        temperature: temperature of the softmax over classes.
    """

    generalist: str
    plane: Anatomical = "axial"
    foreground_prototypes: int = Field(default=8, ge=1, le=256)
    background_prototypes: int = Field(default=32, ge=1, le=1024)
    position_weight: float = Field(default=0.6, ge=0, le=100)
    temperature: float = Field(default=0.1, gt=0, le=10)

    @field_validator("generalist")
    @classmethod
    def _has_feature_maps_of_slices(cls, value: str) -> str:
        return _with_features(value, lambda card: card.feature_maps, " of slices")


class Registration(StrictModel):
    """Labels of the site carried to its unlabeled scans by affine registration; see `sources/registration.py`.

    Attributes:
        iterations: iterations of the optimizer at each resolution.
        atlases: the number of labeled scans that are registered with each unlabeled one. Both bound its time.
    """

    iterations: int = Field(default=100, ge=1, le=1000)
    atlases: int = Field(default=4, ge=1, le=32)


class Sources(StrictModel):
    """What pseudo-labels by evidence are made from, and how; false or null leaves a source out.

    Attributes:
        specialist: whether the teacher's prediction is a source.
        generalists: whether the generalists, prompted by what all others say together, are a source.
        sharpness: s turns the mean p over sources into the target p^s / (p^s + (1 - p)^s).
        volume_tolerance: the target's threshold is chosen so that each class's volume is that of the labels up to this
            factor; null leaves it at 0.5. A good factor is about exp(s), s the standard deviation of the log volume
            between people.
        more: names of further sources, from the registry in `sources/registry.py`.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("more",)

    specialist: bool = True
    generalists: bool = True
    feature_head: FeatureHeadSettings | None = None
    registration: Registration | None = Registration()
    prototypes: Prototypes | None = None
    sharpness: float = Field(default=2.0, ge=1, le=10)
    volume_tolerance: float | None = Field(default=1.25, ge=1, le=100)
    more: tuple[str, ...] = ()

    @field_validator("more")
    @classmethod
    def _known_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            source_builder(name)
        if len(set(value)) < len(value):
            raise ValueError("each source may be named only once")
        return value
