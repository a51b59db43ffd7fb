"""The generalist seam: what a frozen promptable foundation model must offer, and the prompts it may be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class PromptKind(StrEnum):
    """The kinds of prompt that a generalist may declare."""

    BOX_2D = "box-2d"
    POINTS_2D = "points-2d"
    MASK_2D = "mask-2d"
    POINTS_3D = "points-3d"
    MASK_3D = "mask-3d"


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
class Prompts:
    """One prompt set for one target class of one scan. More kinds of prompt become more fields."""

    boxes: tuple[SliceBox, ...] = ()


@dataclass(frozen=True)
class Segmentation:
    """What a generalist answers to one prompt set.

    Attributes:
        probability: foreground probability of the prompted class, (H, W, D) float32 in [0, 1]; 0 where not prompted.
        quality: the model's own estimate of its overlap with the truth for each embedding unit (slice index ->
            predicted IoU).
    """

    probability: Tensor
    quality: Mapping[int, float]


@dataclass(frozen=True)
class GeneralistCard:
    """What a person must know of a generalist before letting it label scans."""

    name: str
    prompt_kinds: frozenset[PromptKind]
    preprocessing: str
    licence: str
    source: str
    training_data: tuple[str, ...]


class Generalist(Protocol):
    """A frozen promptable model. Its parameters are never trained and never leave the site.

    A scan is encoded in *units* (slices for a 2D model, crops for a 3D one), so that only those which a prompt
    needs are ever encoded, each once.
    """

    @property
    def card(self) -> GeneralistCard:
        """Name, licence, accepted prompts and training data."""

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, part of the key of every stored embedding."""

    def units(self, prompts: Prompts) -> tuple[int, ...]:
        """Return the embedding units which these prompts need, ascending, each once."""

    def embed(self, volume: Tensor, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode the given units of a scan (H, W, D); returns unit -> embedding, float32."""

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, shape: tuple[int, int, int]) -> Segmentation:
        """Answer one prompt set from embeddings of all its units; `shape` is the scan's (H, W, D)."""
