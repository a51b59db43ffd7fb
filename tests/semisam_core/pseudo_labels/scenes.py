"""Scans with voxels of three different sizes and objects of three different sides, so that swapped axes show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from semisam_core.generalists import EmbeddingStore, Prompts, Segmentation, VolumeGrid
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.pseudo_labels.fusion import PseudoLabel, make_pseudo_label
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist

SHAPE = (24, 20, 14)
SPACING = (1.5, 2.0, 3.0)
FIRST = (slice(2, 9), slice(3, 8), slice(2, 6))
SECOND = (slice(13, 22), slice(9, 18), slice(5, 12))
TWO_CLASSES = "task.classes=[{name: first, value: 1}, {name: second, value: 2}]"
PLAIN = (
    f"data.spacing_mm={list(SPACING)}",
    "pseudo_labels.smooth_sigma_slices=0.0",
    "pseudo_labels.prompting.margins_mm=[0.0]",
)


def cuboid(*boxes: tuple[slice, slice, slice]) -> Tensor:
    """Return the foreground (H, W, D) of cuboids, 1.0 inside."""
    mask = torch.zeros(SHAPE)
    for box in boxes:
        mask[box] = 1.0
    return mask


def image_of(foreground: Tensor) -> Tensor:
    """Return a scan (1, H, W, D) that is bright inside the foreground, without noise."""
    return (2 * foreground - 1)[None]


def teacher_of(*foreground: Tensor) -> Tensor:
    """Return teacher probabilities (1 + K, H, W, D) from the foreground of each class."""
    stacked = torch.stack(foreground)
    return torch.cat([1 - stacked.amax(0, keepdim=True), stacked])


def plain_plan(*assignments: str) -> Plan:
    """Return a plan with anisotropic voxels, a single margin and no smoothing, changed by dotted assignments."""
    return tiny_plan(*PLAIN, *assignments)


def store_in(folder: Path) -> EmbeddingStore:
    """Return a store of embeddings under a folder."""
    return EmbeddingStore(folder / "embeddings", 10**9)


def pseudo_label(
    folder: Path,
    plan: Plan,
    image: Tensor,
    teacher: Tensor,
    *models: FakeGeneralist,
    calibration: Calibration | None = None,
) -> PseudoLabel:
    """Label one scan with the given models, by default a single `FakeGeneralist`."""
    return make_pseudo_label(image, teacher, models or (FakeGeneralist(),), store_in(folder), plan, calibration)


class Scaled(FakeGeneralist):
    """Answers like `FakeGeneralist`, with every probability multiplied by a factor."""

    def __init__(self, name: str, factor: float, quality: float = 0.9) -> None:
        super().__init__(f"{sum(name.encode()):064x}")
        self.card = replace(self.card, name=name)
        self._factor, self._quality = factor, quality

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        answer = super().segment(embeddings, prompts, grid)
        return Segmentation(answer.probability * self._factor, dict.fromkeys(answer.quality, self._quality))


class Broken(FakeGeneralist):
    """Fails whenever it is prompted."""

    def __init__(self, name: str = "broken") -> None:
        super().__init__("f" * 64)
        self.card = replace(self.card, name=name)

    def segment(self, *_: object) -> Segmentation:
        raise RuntimeError("out of memory")
