"""Prompt strategies: how a region is put to a generalist, and how many answers are wanted.

`boxes`, `points` and `mask` put one prompt set each (the ablation of SemiSAM+, Zhang et al., Medical Image Analysis
2025); `uncertainty-rectified` puts one for each margin, and the disagreement of the answers is the uncertainty;
`scribbles` puts many clicks along the skeleton; `propagated` prompts one slice and lets the model's memory carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from semisam_core.generalists.base import Point, PromptKind, Prompts, Segmentation
from semisam_core.plan_sections.pseudo_labels import Prompting, Strategy
from semisam_core.prompting.boxes import slice_boxes
from semisam_core.prompting.clicks import deepest_voxel, next_click, scribble
from semisam_core.prompting.region import Mask, Region

Ask = Callable[[Prompts], Segmentation]


@dataclass(frozen=True)
class PromptRequest:
    """One class of one scan, put to one generalist.

    Attributes:
        region: what the specialist says.
        probability: its foreground probability (H, W, D), for mask prompts.
        kinds: the prompts that the generalist takes.
        settings: the plan's.
        ask: puts one prompt set to the generalist.
        step: a slice-wise generalist is asked about every `step`-th slice.
    """

    region: Region
    probability: Tensor
    kinds: frozenset[PromptKind]
    settings: Prompting
    ask: Ask
    step: int = 1

    def within(self, region: Region) -> PromptRequest:
        """Return the same question about another region."""
        return replace(self, region=region)

    def slices(self) -> list[int]:
        """Return the slices along the last axis that a slice-wise generalist is asked about."""
        return prompted_slices(self.region.mask, self.step)

    @property
    def volumetric(self) -> bool:
        """Whether clicks are placed in the volume instead of on slices."""
        return PromptKind.POINTS_3D in self.kinds

    def takes(self, *kinds: PromptKind) -> bool:
        """Whether the generalist takes any of these."""
        return bool(self.kinds & set(kinds))


def prompted_slices(mask: Mask, step: int) -> list[int]:
    """Return every `step`-th slice of those that a mask touches.

    They are counted from slice 0, so that they stay the same when the mask changes; a run of slices too short to have
    one is represented by its middle.
    """
    touched = np.flatnonzero(mask.any((0, 1)))
    chosen = []
    for run in np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1):
        chosen += [int(index) for index in run if index % step == 0] or [int(run[len(run) // 2])]
    return chosen


def consult(question: PromptRequest) -> list[Segmentation]:
    """Put a region to a generalist by the plan's strategy; return one answer a prompt set, at least one.

    Raises:
        ValueError: the generalist takes nothing that the strategy can make.
    """
    return _STRATEGIES[question.settings.strategy](question)


def _boxes(question: PromptRequest) -> list[Segmentation]:
    margins = sorted(question.settings.margins_mm)
    return [_ask_boxes(question, margins[len(margins) // 2])]


def _ask_boxes(question: PromptRequest, margin_mm: float) -> Segmentation:
    chosen = set(question.slices())
    boxes = tuple(
        box for box in slice_boxes(question.region, margin_mm, question.settings.smooth_slices) if box.index in chosen
    )
    points = tuple(_foreign_clicks(question)) if question.takes(PromptKind.POINTS_2D) else ()
    return question.ask(Prompts(boxes=boxes, points=points))


def _mask(question: PromptRequest) -> list[Segmentation]:
    inside = torch.from_numpy(question.region.mask)
    # Outside of the region the mask says background, however sure the specialist was of what is not prompted.
    mask = torch.where(inside, question.probability.clamp_min(0.51), question.probability.clamp_max(0.49))
    if not question.takes(PromptKind.MASK_3D):
        asked = torch.zeros(mask.shape[-1])
        asked[question.slices()] = 1.0
        mask = mask * asked
    return [question.ask(Prompts(mask=mask))]


def _points(question: PromptRequest) -> list[Segmentation]:
    """Click, look at the answer, click where it is most wrong; stop where it agrees, or after the last click."""
    clicks: list[Point] = list(_foreign_clicks(question))
    answer: Segmentation | None = None
    for _ in range(question.settings.clicks):
        said = np.zeros_like(question.region.mask) if answer is None else (answer.probability > 0.5).numpy()
        fresh = list(_next_clicks(question, said, clicks))
        if not fresh:
            break
        clicks += fresh
        previous = answer.probability if answer is not None and _takes_mask(question) else None
        answer = question.ask(Prompts(points=tuple(clicks), mask=previous))
    if answer is None:
        raise ValueError("a region without a voxel cannot be clicked on")
    return [answer]


def _next_clicks(question: PromptRequest, said: Mask, clicks: list[Point]) -> Iterable[Point]:
    """Yield the next click in the volume, or on each slice of the region; never one that was given before."""
    region = question.region
    given = {point.position for point in clicks}
    if question.volumetric:
        found = next_click(said, region.mask, region.spacing_mm)
        places = [] if found is None else [(found[0], found[1])]
    else:
        places = []
        for index in question.slices():
            on_slice = next_click(said[:, :, index], region.mask[:, :, index], region.spacing_mm[:2])
            if on_slice is not None:
                places.append(((*on_slice[0], index), on_slice[1]))
    for (row, column, index), positive in places:
        if (position := (float(row), float(column), float(index))) not in given:
            yield Point(position, positive)


def _scribbles(question: PromptRequest) -> list[Segmentation]:
    region, count = question.region, question.settings.scribble_points
    points = list(_foreign_clicks(question))
    if question.volumetric:
        points += [Point((float(h), float(w), float(d))) for h, w, d in scribble(region.mask, count)]
    else:
        for index in question.slices():
            spots = scribble(region.mask[:, :, index], count)
            points += [Point((float(h), float(w), float(index))) for h, w in spots]
    return [question.ask(Prompts(points=tuple(points)))]


def _propagated(question: PromptRequest) -> list[Segmentation]:
    region = question.region
    areas = region.mask.sum((0, 1))
    index, touched = int(areas.argmax()), np.flatnonzero(areas)
    beyond = question.settings.span_margin_slices
    span = (max(0, int(touched[0]) - beyond), min(len(areas) - 1, int(touched[-1]) + beyond))
    widest = np.zeros_like(region.mask)
    widest[:, :, index] = region.mask[:, :, index]
    one = question.within(Region(widest, region.others, region.spacing_mm))
    margins = sorted(question.settings.margins_mm)
    if question.takes(PromptKind.BOX_2D):
        boxes = slice_boxes(one.region, margins[len(margins) // 2], 1)
        return [question.ask(Prompts(boxes=boxes, span=span))]
    row, column = deepest_voxel(widest[:, :, index], region.spacing_mm[:2])
    return [question.ask(Prompts(points=(Point((float(row), float(column), float(index))),), span=span))]


def _uncertainty_rectified(question: PromptRequest) -> list[Segmentation]:
    """Ask once for each margin: about boxes of that margin, or about the region grown by it."""
    margins = question.settings.margins_mm
    if question.takes(PromptKind.BOX_2D):
        return [_ask_boxes(question, margin) for margin in margins]
    single = _points if question.takes(PromptKind.POINTS_2D, PromptKind.POINTS_3D) else _mask
    return [answer for margin in margins for answer in single(question.within(question.region.grown(margin)))]


def _foreign_clicks(question: PromptRequest) -> Iterable[Point]:
    """Yield negative clicks in the other classes' foreground: in the volume, or on each slice of the region."""
    region = question.region
    if not question.settings.class_aware or not region.others.any():
        return
    if question.volumetric:
        row, column, index = deepest_voxel(region.others, region.spacing_mm)
        yield Point((float(row), float(column), float(index)), positive=False)
        return
    foreign = set(np.flatnonzero(region.others.any(axis=(0, 1))))
    for index in question.slices():
        if index not in foreign:
            continue
        row, column = deepest_voxel(region.others[:, :, index], region.spacing_mm[:2])
        yield Point((float(row), float(column), float(index)), positive=False)


def _takes_mask(question: PromptRequest) -> bool:
    return question.takes(PromptKind.MASK_3D if question.volumetric else PromptKind.MASK_2D)


_STRATEGIES: dict[Strategy, Callable[[PromptRequest], list[Segmentation]]] = {
    Strategy.BOXES: _boxes,
    Strategy.MASK: _mask,
    Strategy.POINTS: _points,
    Strategy.SCRIBBLES: _scribbles,
    Strategy.PROPAGATED: _propagated,
    Strategy.UNCERTAINTY_RECTIFIED: _uncertainty_rectified,
}
