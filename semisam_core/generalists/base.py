"""The interface of generalists: frozen promptable foundation models, and the prompts they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from torch import Tensor


class PromptKind(StrEnum):
    """The kinds of prompt that a generalist may declare.

    `PROPAGATED`: prompts on a few slices, which the model carries to the others. Text would be another kind here and
    another field of `Prompts`; no generalist takes it yet.
    """

    BOX_2D = "box-2d"
    POINTS_2D = "points-2d"
    MASK_2D = "mask-2d"
    POINTS_3D = "points-3d"
    MASK_3D = "mask-3d"
    PROPAGATED = "propagated"


SLICE_KINDS = frozenset({PromptKind.BOX_2D, PromptKind.POINTS_2D, PromptKind.MASK_2D, PromptKind.PROPAGATED})


@dataclass(frozen=True)
class VolumeGrid:
    """The voxels of a scan as a generalist sees it.

    Attributes:
        shape: (H, W, D); a slice-wise model sees (H, W) slices along D.
        spacing_mm: voxel size along H, W, D.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class SliceBox:
    """A box around the target on one slice, in voxels of the scan.

    Attributes:
        index: slice number along the last axis of the scan.
        bounds: (row_min, column_min, row_max, column_max), inclusive, on the (H, W) plane. May be fractional.
    """

    index: int
    bounds: tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One click.

    Attributes:
        position: (h, w, d) in voxels of the scan; whole numbers are voxel centres. For a slice-wise model, d is a slice
            number and must be whole.
        positive: whether the click is on the target; a negative one is on something else.
    """

    position: tuple[float, float, float]
    positive: bool = True


@dataclass(frozen=True, eq=False)
class Prompts:
    """One prompt set for one target class of one scan. A new kind of prompt is a new field.

    Attributes:
        boxes: boxes on slices.
        points: clicks, on slices or in the volume.
        mask: foreground probability of the class (H, W, D) in [0, 1]: the specialist's, or the model's previous answer.
            A slice-wise model uses it on each slice that has a voxel above 0.5 or another prompt.
        span: first and last slice to answer, for a model that carries prompts from slice to slice; with None only the
            prompted slices are answered.
    """

    boxes: tuple[SliceBox, ...] = ()
    points: tuple[Point, ...] = ()
    mask: Tensor | None = None
    span: tuple[int, int] | None = None

    def refuse_kinds_beyond(self, card: GeneralistCard) -> None:
        """Check that a model takes all kinds of prompt that are given.

        Raises:
            ValueError: a prompt is of a kind that the card does not declare.
        """
        flat = bool(card.prompt_kinds & SLICE_KINDS)
        given = {
            PromptKind.BOX_2D: bool(self.boxes),
            PromptKind.POINTS_2D if flat else PromptKind.POINTS_3D: bool(self.points),
            PromptKind.MASK_2D if flat else PromptKind.MASK_3D: self.mask is not None,
            PromptKind.PROPAGATED: self.span is not None,
        }
        if refused := [kind.value for kind, there in given.items() if there and kind not in card.prompt_kinds]:
            accepted = ", ".join(sorted(card.prompt_kinds))
            raise ValueError(f"{card.name} takes no prompts of kind {', '.join(refused)}; accepted: {accepted}")

    def slices(self) -> tuple[int, ...]:
        """Return the slices along the last axis that have a box, a point or mask foreground, in ascending order."""
        found = {box.index for box in self.boxes} | {round(point.position[2]) for point in self.points}
        if self.mask is not None:
            found |= {int(index) for index in (self.mask > 0.5).any(0).any(0).nonzero()[:, 0]}
        return tuple(sorted(found))


@dataclass(frozen=True)
class Segmentation:
    """A generalist's answer to one prompt set.

    Attributes:
        probability: foreground probability of the prompted class, (H, W, D) float32 in [0, 1]; 0 where not prompted.
        quality: embedding unit (slice or crop) -> the model's own estimate of its overlap with the truth there
            (predicted IoU in [0, 1]).
    """

    probability: Tensor
    quality: Mapping[int, float]


@dataclass(frozen=True)
class GeneralistCard:
    """What a person should know about a generalist before letting it label scans.

    Attributes:
        name: as plans and site files call it.
        prompt_kinds: the prompts that it was trained for.
        preprocessing: how scans are prepared for the encoder, versioned; part of the key of stored embeddings.
        licence: licence of the weights.
        source: the name of the weights and where they are published.
        training_data: what it was trained on, to the extent that this is published.
        overlaps: common benchmarks whose scans are, or may be, in its training data.
        feature_channels: channels of the feature maps that its embeddings hold, from which feature heads and, for
            slices, prototypes are learned. 0 for a model without.
        feature_dimensions: 2 for maps of slices, where the model implements `slices.FeatureMaps`; 3 for maps of cubes,
            where it implements `crops.CubeFeatures`.
    """

    name: str
    prompt_kinds: frozenset[PromptKind]
    preprocessing: str
    licence: str
    source: str
    training_data: tuple[str, ...]
    overlaps: tuple[str, ...] = ()
    feature_channels: int = 0
    feature_dimensions: Literal[2, 3] = 2

    @property
    def feature_maps(self) -> bool:
        """Whether its embeddings are feature maps of slices."""
        return self.feature_channels > 0 and self.feature_dimensions == 2


class Generalist(Protocol):
    """A frozen promptable model. Its parameters are never trained and never leave the site.

    A scan is encoded in *units*: slices for a 2D model, crops for a 3D one. Only units that a prompt needs are encoded,
    each once. An embedding is a single float tensor whose shape is up to the model.
    """

    @property
    def card(self) -> GeneralistCard:
        """Name, licence, accepted prompts and training data."""

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, part of the key of every stored embedding."""

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the embedding units that these prompts need, in ascending order."""

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode units of a scan (H, W, D); return unit -> embedding, float32 on the CPU."""

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Answer one prompt set from the embeddings of all its units."""
