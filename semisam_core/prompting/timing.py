"""What a generalist costs on this machine, measured on one standard scan."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semisam_core.generalists.base import Generalist, PromptKind, Prompts, Segmentation, VolumeGrid
from semisam_core.plan_sections.pseudo_labels import USABLE_KINDS, Prompting, Strategy
from semisam_core.prompting import PromptRequest, Region, prompt_generalist

SIDE = 64
SPACING_MM = 2.0
RADIUS_MM = 24.0


@dataclass(frozen=True)
class Timing:
    """Seconds for a scan of 128 mm cubed in 2 mm voxels that shows a ball of 48 mm: 24 slices, or one crop.

    Attributes:
        encode_s: time to encode, once per scan.
        answer_s: time to answer one prompt set, at every refresh.
    """

    encode_s: float
    answer_s: float

    @property
    def scan_s(self) -> float:
        """Seconds for a scan that has not been encoded yet."""
        return self.encode_s + self.answer_s


def measure(generalist: Generalist) -> Timing:
    """Time one scan; encoding and answering are measured separately."""
    side = torch.arange(SIDE).float() - SIDE / 2 + 0.5
    distance = torch.sqrt(side[:, None, None] ** 2 + side[None, :, None] ** 2 + side[None, None, :] ** 2)
    ball = distance * SPACING_MM < RADIUS_MM
    noise = torch.randn(ball.shape, generator=torch.Generator().manual_seed(0))
    volume, grid = ball.float() + 0.1 * noise, VolumeGrid((SIDE, SIDE, SIDE), (SPACING_MM,) * 3)
    spent = {"encode": 0.0, "answer": 0.0}
    embeddings: dict[int, Tensor] = {}

    def segment(prompts: Prompts) -> Segmentation:
        start = time.perf_counter()
        missing = [unit for unit in generalist.units(prompts, grid) if unit not in embeddings]
        embeddings.update(generalist.embed(volume, grid, missing) if missing else {})
        encoded = time.perf_counter()
        answer = generalist.segment(embeddings, prompts, grid)
        spent["encode"] += encoded - start
        spent["answer"] += time.perf_counter() - encoded
        return answer

    mask = ball.numpy()
    region = Region(mask, np.zeros_like(mask), grid.spacing_mm)
    settings = Prompting(strategy=_strategy(generalist.card.prompt_kinds), clicks=1)
    prompt_generalist(PromptRequest(region, ball.float(), generalist.card.prompt_kinds, settings, segment))
    return Timing(spent["encode"], spent["answer"])


def _strategy(kinds: frozenset[PromptKind]) -> Strategy:
    """Return a strategy that gives the model one prompt set of a kind that it takes."""
    single = (Strategy.BOXES, Strategy.POINTS, Strategy.MASK)
    return next(strategy for strategy in single if kinds & USABLE_KINDS[strategy])
