"""A generalist without weights that segments bright voxels inside each box and records what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from semisam_core.generalists.base import GeneralistCard, PromptKind, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.registry import GeneralistSpec, generalist_names, register
from semisam_core.generalists.slices import Framing

CARD = GeneralistCard(
    name="fake",
    prompt_kinds=frozenset({PromptKind.BOX_2D}),
    preprocessing="none",
    licence="none",
    source="tests",
    training_data=(),
    feature_channels=2,
)
SIDE, FEATURES = 64, 32


class FakeGeneralist:
    """Answers with a steep sigmoid of the scan's intensity inside the box, 0 outside."""

    def __init__(self, sha256: str = "0" * 64) -> None:
        self.card = CARD
        self.weights_sha256 = sha256
        self.embedded: list[int] = []
        self.prompts: list[Prompts] = []
        self.framing = Framing(SIDE)

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        return tuple(sorted({box.index for box in prompts.boxes}))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        self.embedded += list(units)
        return {unit: volume[:, :, unit].clone() for unit in units}

    def feature_map(self, embedding: Tensor) -> Tensor:
        """Return two complementary features, dark and bright, (2, 32, 32)."""
        framed = self.framing.pad(self.framing.frames(embedding[None]), float(embedding.min()))
        bright = torch.sigmoid(6 * functional.adaptive_avg_pool2d(framed[None], FEATURES)[0, 0])
        return torch.stack([1 - bright, bright])

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        self.prompts.append(prompts)
        probability = torch.zeros(grid.shape)
        for box in prompts.boxes:
            top, left, bottom, right = (round(bound) for bound in box.bounds)
            inside = (slice(top, bottom + 1), slice(left, right + 1))
            probability[(*inside, box.index)] = torch.sigmoid(6 * embeddings[box.index][inside])
        return Segmentation(probability, {box.index: 0.9 for box in prompts.boxes})


def _load(device: torch.device, weights: Path | None, sha256: str | None) -> FakeGeneralist:
    return FakeGeneralist()


_SPEC = GeneralistSpec(CARD, _load, packaged=True)


def register_fake() -> None:
    """Register `fake`, once per process."""
    if "fake" not in generalist_names():
        register(_SPEC)
