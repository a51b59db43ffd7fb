"""Prompt strategies: how a region becomes prompts for a generalist, and how many answers are collected.

`boxes`, `points` and `mask` give one prompt set each (the ablation of SemiSAM+, Zhang et al., Medical Image Analysis
2025). `uncertainty-rectified` gives one prompt set per margin; where the answers disagree, the pseudo-label is
uncertain. `scribbles` clicks many times along the skeleton. `propagated` prompts one slice of each component and lets
the model's memory carry the prompt through the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from semisam_core.components import Mask
from semisam_core.generalists.base import Point, PromptKind, Prompts, Segmentation
from semisam_core.plan_sections.pseudo_labels import Prompting, Strategy
from semisam_core.prompting.boxes import slice_boxes
from semisam_core.prompting.clicks import deepest_voxel, next_click, scribble
from semisam_core.prompting.region import Region
from semisam_core.scratch import Scratch

Segment = Callable[[Prompts], Segmentation]


@dataclass(frozen=True)
class PromptRequest:
    """What one generalist is to be prompted with for one class of one scan.

    Attributes:
        region: the specialist's region.
        probability: the specialist's foreground probability (H, W, D), for mask prompts.
        kinds: the prompts that the generalist takes.
        settings: the plan's.
        segment: runs the generalist on one prompt set.
        step: a slice-wise generalist is prompted on every `step`-th slice.
        scratch: where an answer is kept while clicks are placed by it; memory by default.
    """

    region: Region
    probability: Tensor
    kinds: frozenset[PromptKind]
    settings: Prompting
    segment: Segment
    step: int = 1
    scratch: Scratch = field(default_factory=Scratch)

    def within(self, region: Region) -> PromptRequest:
        """Return the same request for another region."""
        return replace(self, region=region)

    def slices(self) -> list[int]:
        """Return the slices along the last axis on which a slice-wise generalist is prompted."""
        return prompted_slices(self.region.mask, self.step)

    @property
    def middle_margin_mm(self) -> float:
        """The median of the plan's margins, for strategies that use a single one."""
        margins = sorted(self.settings.margins_mm)
        return margins[len(margins) // 2]

    @property
    def volumetric(self) -> bool:
        """Whether clicks are placed in the volume rather than on slices."""
        return PromptKind.POINTS_3D in self.kinds

    def takes(self, *kinds: PromptKind) -> bool:
        """Whether the generalist takes any of these kinds."""
        return bool(self.kinds & set(kinds))


def prompted_slices(mask: Mask, step: int) -> list[int]:
    """Return every `step`-th of the slices that a mask touches.

    Slices are counted from 0, not from the mask, so that a mask that changes is prompted on slices already encoded. A
    run of slices too short to contain one of them is represented by its middle slice.
    """
    touched = np.flatnonzero(mask.any((0, 1)))
    chosen = []
    for run in np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1):
        chosen += [int(index) for index in run if index % step == 0] or [int(run[len(run) // 2])]
    return chosen


def prompt_generalist(request: PromptRequest) -> list[Segmentation]:
    """Prompt a generalist by the plan's strategy.

    Returns:
        One answer per prompt set, at least one.

    Raises:
        ValueError: the generalist takes none of the prompts that the strategy makes.
    """
    return list(answers_of(request))


def answers_of(request: PromptRequest) -> Iterator[Segmentation]:
    """Yield what `prompt_generalist` returns; each answer is made when it is asked for, and none is kept."""
    return _STRATEGIES[request.settings.strategy](request)


def _boxes(request: PromptRequest) -> Iterator[Segmentation]:
    yield _box_answer(request, request.middle_margin_mm)


def _box_answer(request: PromptRequest, margin_mm: float) -> Segmentation:
    settings, chosen = request.settings, set(request.slices())
    boxes = slice_boxes(request.region, margin_mm, settings.smooth_slices, settings.component_share)
    points = tuple(_negative_clicks(request)) if request.takes(PromptKind.POINTS_2D) else ()
    return request.segment(Prompts(boxes=tuple(box for box in boxes if box.index in chosen), points=points))


def _mask(request: PromptRequest) -> Iterator[Segmentation]:
    mask, prompted = torch.empty(request.region.mask.shape), torch.ones(request.region.mask.shape[-1])
    if not request.takes(PromptKind.MASK_3D):
        prompted.zero_()[request.slices()] = 1.0
    for row, inside, known in zip(mask, torch.from_numpy(request.region.mask), request.probability, strict=True):
        # Outside the region the prompt says background, however sure the specialist is of the components left out.
        row.copy_(torch.where(inside, known.clamp_min(0.51), known.clamp_max(0.49)) * prompted)
    yield request.segment(Prompts(mask=mask))


def _points(request: PromptRequest) -> Iterator[Segmentation]:
    yield _clicked(request)


def _clicked(request: PromptRequest) -> Segmentation:
    """Click, compare the answer with the region, click on the largest error; stop when they agree or clicks run out."""
    clicks: list[Point] = list(_negative_clicks(request))
    answer: Segmentation | None = None
    for _ in range(request.settings.clicks):
        fresh = list(_next_clicks(request, _foreground(request, answer), clicks))
        if not fresh:
            break
        clicks += fresh
        previous = answer.probability if answer is not None and _takes_mask(request) else None
        answer = request.segment(Prompts(points=tuple(clicks), mask=previous))
        answer = replace(answer, probability=request.scratch.keep(answer.probability))
        del previous
    if answer is None:
        raise ValueError("an empty region cannot be clicked on")
    return answer


def _foreground(request: PromptRequest, answer: Segmentation | None) -> Mask:
    if answer is None:
        return np.zeros_like(request.region.mask)
    found: Mask = request.scratch.above(answer.probability, 0.5).numpy()
    return found


def _next_clicks(request: PromptRequest, answered: Mask, clicks: list[Point]) -> Iterable[Point]:
    """Yield the next click in the volume, or on each slice of the region; never the same click twice."""
    region = request.region
    given = {point.position for point in clicks}
    places: list[tuple[tuple[int, ...], bool]] = []
    if request.volumetric:
        if (found := next_click(answered, region.mask, region.spacing_mm)) is not None:
            places.append(found)
    else:
        for index in request.slices():
            on_slice = next_click(answered[:, :, index], region.mask[:, :, index], region.spacing_mm[:2])
            if on_slice is not None:
                places.append(((*on_slice[0], index), on_slice[1]))
    for place, positive in places:
        if (point := _click(place, positive)).position not in given:
            yield point


def _scribbles(request: PromptRequest) -> Iterator[Segmentation]:
    region, count = request.region, request.settings.scribble_points
    points = list(_negative_clicks(request))
    if request.volumetric:
        points += [_click(voxel) for voxel in scribble(region.mask, count)]
    else:
        for index in request.slices():
            points += [_click((*pixel, index)) for pixel in scribble(region.mask[:, :, index], count)]
    yield request.segment(Prompts(points=tuple(points)))


def _propagated(request: PromptRequest) -> Iterator[Segmentation]:
    """Prompt each component on its widest slice; the model carries it through the others, one component at a time."""
    yield _united(_propagated_answer(request.within(part)) for part in request.region.parts())


def _propagated_answer(request: PromptRequest) -> Segmentation:
    region, settings = request.region, request.settings
    areas = region.mask.sum((0, 1))
    index, touched = int(areas.argmax()), np.flatnonzero(areas)
    beyond = settings.span_margin_slices
    span = (max(0, int(touched[0]) - beyond), min(len(areas) - 1, int(touched[-1]) + beyond))
    if not request.takes(PromptKind.BOX_2D):
        click = _click((*deepest_voxel(region.mask[:, :, index], region.spacing_mm[:2]), index))
        return request.segment(Prompts(points=(click,), span=span))
    widest = np.zeros_like(region.mask)
    widest[:, :, index] = region.mask[:, :, index]
    boxes = slice_boxes(replace(region, mask=widest), request.middle_margin_mm, 1, settings.component_share)
    return request.segment(Prompts(boxes=boxes, span=span))


def _united(answers: Iterable[Segmentation]) -> Segmentation:
    """Unite answers about parts of one target: the higher probability, and the mean quality of each slice."""
    qualities: dict[int, list[float]] = {}
    highest: Tensor | None = None
    for answer in answers:
        for index, quality in answer.quality.items():
            qualities.setdefault(index, []).append(quality)
        highest = answer.probability if highest is None else torch.maximum(highest, answer.probability, out=highest)
        del answer  # before the next one is made
    if highest is None:
        raise ValueError("an empty region has no part to prompt")
    return Segmentation(highest, {index: sum(each) / len(each) for index, each in sorted(qualities.items())})


def _uncertainty_rectified(request: PromptRequest) -> Iterator[Segmentation]:
    """Prompt once per margin: with boxes of that margin, or with the region grown by it."""
    margins = request.settings.margins_mm
    if request.takes(PromptKind.BOX_2D):
        yield from (_box_answer(request, margin) for margin in margins)
        return
    single = _points if request.takes(PromptKind.POINTS_2D, PromptKind.POINTS_3D) else _mask
    for margin in margins:
        yield from single(request.within(request.region.grown(margin)))


def _negative_clicks(request: PromptRequest) -> Iterable[Point]:
    """Yield negative clicks in the other classes' foreground: in the volume, or on each slice of the region."""
    region = request.region
    if not request.settings.class_aware or not region.others.any():
        return
    if request.volumetric:
        yield _click(deepest_voxel(region.others, region.spacing_mm), positive=False)
        return
    for index in request.slices():
        others = region.others[:, :, index]
        if others.any():
            yield _click((*deepest_voxel(others, region.spacing_mm[:2]), index), positive=False)


def _click(voxel: Sequence[int], positive: bool = True) -> Point:
    row, column, index = voxel
    return Point((float(row), float(column), float(index)), positive)


def _takes_mask(request: PromptRequest) -> bool:
    return request.takes(PromptKind.MASK_3D if request.volumetric else PromptKind.MASK_2D)


_STRATEGIES: dict[Strategy, Callable[[PromptRequest], Iterator[Segmentation]]] = {
    Strategy.BOXES: _boxes,
    Strategy.MASK: _mask,
    Strategy.POINTS: _points,
    Strategy.SCRIBBLES: _scribbles,
    Strategy.PROPAGATED: _propagated,
    Strategy.UNCERTAINTY_RECTIFIED: _uncertainty_rectified,
}
