"""A generalist that answers with what is brighter than average inside each box."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from semisam_core import generalists
from semisam_core.generalists import GeneralistCard, GeneralistSpec, PromptKind, Prompts, Segmentation, VolumeGrid

CARD = GeneralistCard("bright", frozenset({PromptKind.BOX_2D}), "v1: none", "Apache-2.0", "no weights", ())


class BrightGeneralist:
    """Encodes slices, each once, and answers prompts on them."""

    card, weights_sha256 = CARD, "0" * 64

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the slices that have a prompt."""
        return prompts.slices()

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode slices of a scan (H, W, D); the site stores the result."""
        return {unit: volume[:, :, unit].clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Return the foreground's probability (H, W, D), and an estimate of quality for each slice."""
        probability = torch.zeros(grid.shape)
        for box in prompts.boxes:
            top, left, bottom, right = (round(bound) for bound in box.bounds)
            inside = embeddings[box.index][top : bottom + 1, left : right + 1]
            probability[top : bottom + 1, left : right + 1, box.index] = torch.sigmoid(4 * (inside - inside.mean()))
        return Segmentation(probability, {box.index: 0.5 for box in prompts.boxes})


def register() -> None:
    """Let plans and site files name the generalist `bright`."""
    generalists.register(GeneralistSpec(CARD, lambda device, weights, sha256: BrightGeneralist(), packaged=True))
