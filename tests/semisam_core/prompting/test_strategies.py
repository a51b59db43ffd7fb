"""Each strategy makes the prompts it is named for, of kinds that the model takes, and stops in time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from semisam_core.generalists.base import PromptKind, Prompts, Segmentation
from semisam_core.plan_sections.pseudo_labels import USABLE_KINDS, Prompting, Strategy
from semisam_core.prompting import PromptRequest, Region, prompt_generalist
from semisam_core.prompting.strategies import prompted_slices

SHAPE = (20, 18, 12)
SPACING = (1.0, 2.0, 4.0)
K = PromptKind


def _mask(low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    return mask


TARGET = _mask((3, 4, 2), (9, 12, 7))
NEIGHBOUR = _mask((11, 4, 1), (17, 12, 7))


class Recorder:
    """A generalist that records its prompts and returns the given masks in turn, repeating the last one."""

    def __init__(self, *answers: np.ndarray) -> None:
        self._answers = [torch.from_numpy(answer).float() for answer in answers or (TARGET,)]
        self.received: list[Prompts] = []

    def __call__(self, prompts: Prompts) -> Segmentation:
        answer = self._answers[min(len(self.received), len(self._answers) - 1)]
        self.received.append(prompts)
        return Segmentation(answer, {0: 0.5})


def _request(
    strategy: Strategy, kinds: set[PromptKind], segment: Recorder, others: np.ndarray | None = None, **settings: object
) -> PromptRequest:
    region = Region(TARGET, np.zeros(SHAPE, bool) if others is None else others, SPACING)
    probability = torch.from_numpy(TARGET).float() * 0.8 + 0.1
    prompting = Prompting(strategy=strategy, smooth_slices=1).model_copy(update=settings)
    return PromptRequest(region, probability, frozenset(kinds), prompting, segment)


def _inside(prompts: Prompts, mask: np.ndarray) -> list[bool]:
    return [bool(mask[tuple(round(p) for p in point.position)]) for point in prompts.points]


def test_boxes_prompts_with_the_middle_margin() -> None:
    recorder = Recorder()
    answers = prompt_generalist(_request(Strategy.BOXES, {K.BOX_2D}, recorder, margins_mm=(-2.0, 0.0, 4.0)))
    (prompts,) = recorder.received
    assert len(answers) == 1
    assert [box.index for box in prompts.boxes] == [2, 3, 4, 5, 6, 7]
    assert {box.bounds for box in prompts.boxes} == {(3.0, 4.0, 9.0, 12.0)}


def test_uncertainty_rectified_prompts_with_boxes_of_each_margin() -> None:
    recorder = Recorder()
    answers = prompt_generalist(
        _request(Strategy.UNCERTAINTY_RECTIFIED, {K.BOX_2D}, recorder, margins_mm=(-2.0, 0.0, 4.0))
    )
    assert len(answers) == 3
    lefts = [each.boxes[0].bounds[1] for each in recorder.received]
    assert lefts == [5.0, 4.0, 2.0]


@pytest.mark.parametrize("kinds", [{K.POINTS_3D}, {K.POINTS_2D}, {K.MASK_3D}, {K.MASK_2D}])
def test_uncertainty_rectified_grows_the_region_for_models_without_boxes(kinds: set[PromptKind]) -> None:
    recorder = Recorder()
    request = _request(Strategy.UNCERTAINTY_RECTIFIED, kinds, recorder, margins_mm=(-4.0, 0.0, 4.0), clicks=1)
    assert len(prompt_generalist(request)) == 3


def test_a_mask_prompt_is_the_specialists_probability_and_background_outside_the_region() -> None:
    recorder = Recorder()
    request = _request(Strategy.MASK, {K.MASK_3D}, recorder)
    speck = request.probability.clone()
    speck[19, 17, 11] = 0.99  # a component that does not prompt
    prompt_generalist(replace(request, probability=speck))
    mask = recorder.received[0].mask
    assert mask is not None
    assert torch.equal(mask > 0.5, torch.from_numpy(TARGET))


def test_points_in_the_volume_follow_the_largest_error_and_carry_the_last_answer() -> None:
    recorder = Recorder(TARGET | NEIGHBOUR, TARGET)
    answers = prompt_generalist(_request(Strategy.POINTS, {K.POINTS_3D, K.MASK_3D}, recorder, clicks=5))
    first, second = recorder.received  # the second answer agrees, so there is no third click
    assert [point.positive for point in first.points] == [True]
    assert _inside(first, TARGET) == [True]
    assert [point.positive for point in second.points] == [True, False]
    assert _inside(second, NEIGHBOUR & ~TARGET) == [False, True]
    assert first.mask is None
    assert second.mask is not None
    assert torch.equal(second.mask > 0.5, torch.from_numpy(TARGET | NEIGHBOUR))
    assert len(answers) == 1


def test_points_stop_after_the_last_click_even_without_agreement() -> None:
    recorder = Recorder(np.zeros(SHAPE, bool))
    prompt_generalist(_request(Strategy.POINTS, {K.POINTS_3D}, recorder, clicks=3))
    # A click is never repeated, so there may be fewer.
    assert 1 <= len(recorder.received) <= 3
    assert len({point.position for point in recorder.received[-1].points}) == len(recorder.received[-1].points)


def test_points_click_on_each_slice_of_a_slice_wise_model() -> None:
    recorder = Recorder()
    prompt_generalist(_request(Strategy.POINTS, {K.POINTS_2D}, recorder))
    assert sorted(point.position[2] for point in recorder.received[0].points) == [2, 3, 4, 5, 6, 7]
    assert all(_inside(recorder.received[0], TARGET))


def test_no_state_carries_over_from_one_request_to_the_next() -> None:
    fresh, used = Recorder(), Recorder()
    prompt_generalist(_request(Strategy.POINTS, {K.POINTS_3D}, used))
    prompt_generalist(_request(Strategy.POINTS, {K.POINTS_3D}, used))
    prompt_generalist(_request(Strategy.POINTS, {K.POINTS_3D}, fresh))
    assert used.received[-1].points == fresh.received[-1].points


def test_scribbles_click_along_the_skeleton() -> None:
    recorder = Recorder()
    request = _request(Strategy.SCRIBBLES, {K.POINTS_3D}, recorder, scribble_points=6)
    vessel = _mask((3, 4, 2), (5, 16, 4))
    prompt_generalist(request.within(replace(request.region, mask=vessel)))
    points = recorder.received[0].points
    assert 1 < len(points) <= 6
    assert all(_inside(recorder.received[0], vessel))
    assert all(point.positive for point in points)


def test_propagated_prompts_the_widest_slice_and_spans_the_component() -> None:
    recorder = Recorder()
    request = _request(Strategy.PROPAGATED, {K.BOX_2D, K.PROPAGATED}, recorder, span_margin_slices=2)
    request.region.mask[3:12, 4:13, 5] = True
    try:
        prompt_generalist(request)
    finally:
        request.region.mask[10:12, 4:13, 5] = False
    (prompts,) = recorder.received
    assert [box.index for box in prompts.boxes] == [5]
    assert prompts.span == (0, 9)


@pytest.mark.parametrize("kinds", [{K.POINTS_3D}, {K.POINTS_2D}, {K.POINTS_2D, K.BOX_2D}])
@pytest.mark.parametrize("aware", [True, False])
def test_other_classes_are_negative_clicks_where_the_plan_is_class_aware(kinds: set[PromptKind], aware: bool) -> None:
    recorder = Recorder()
    strategy = Strategy.BOXES if K.BOX_2D in kinds else Strategy.POINTS
    prompt_generalist(_request(strategy, kinds, recorder, NEIGHBOUR, class_aware=aware))
    negative = [point for point in recorder.received[0].points if not point.positive]
    assert bool(negative) == aware
    assert all(NEIGHBOUR[tuple(round(p) for p in point.position)] for point in negative)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), step=st.integers(1, 5))
def test_prompted_slices_lie_on_a_fixed_lattice_and_every_run_of_slices_has_one(seed: int, step: int) -> None:
    mask = np.zeros(SHAPE, bool)
    mask[0, 0, :] = np.random.default_rng(seed).random(SHAPE[2]) > 0.4
    chosen = prompted_slices(mask, step)
    touched = np.flatnonzero(mask[0, 0])
    assert set(chosen) <= set(touched)
    assert {index for index in touched if index % step == 0} <= set(chosen)
    for run in np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1):
        assert not len(run) or set(run) & set(chosen)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("step", [1, 3])
def test_every_strategy_uses_only_kinds_that_the_model_takes(strategy: Strategy, step: int) -> None:
    for kind in USABLE_KINDS[strategy]:
        recorder = Recorder()
        kinds = {kind, K.BOX_2D} if kind is K.PROPAGATED else {kind}
        answers = prompt_generalist(replace(_request(strategy, kinds, recorder), step=step))
        assert answers
        for prompts in recorder.received:
            assert _used(prompts) <= kinds | {K.MASK_2D, K.MASK_3D}


def _used(prompts: Prompts) -> set[PromptKind]:
    used: set[PromptKind] = set()
    if prompts.boxes:
        used.add(K.BOX_2D)
    if prompts.span:
        used.add(K.PROPAGATED)
    return used


def test_a_slice_wise_mask_prompt_has_foreground_on_the_chosen_slices_only() -> None:
    recorder = Recorder()
    prompt_generalist(replace(_request(Strategy.MASK, {K.MASK_2D}, recorder), step=3))
    mask: Tensor | None = recorder.received[0].mask
    assert mask is not None
    assert recorder.received[0].slices() == (3, 6)


LEFT, RIGHT = _mask((2, 1, 2), (8, 5, 7)), _mask((11, 9, 4), (16, 15, 10))  # two components that share slices


def _of(request: PromptRequest, mask: np.ndarray, connected: bool = False) -> PromptRequest:
    return request.within(replace(request.region, mask=mask, connected=connected))


@pytest.mark.parametrize(("connected", "boxes"), [(False, {(2, 1, 8, 5), (11, 9, 16, 15)}), (True, {(2, 1, 16, 15)})])
def test_components_of_a_slice_have_a_box_each_unless_the_class_is_connected(
    connected: bool, boxes: set[tuple[int, ...]]
) -> None:
    recorder = Recorder()
    prompt_generalist(_of(_request(Strategy.BOXES, {K.BOX_2D}, recorder), LEFT | RIGHT, connected))
    (prompts,) = recorder.received
    assert {box.bounds for box in prompts.boxes if box.index == 5} == boxes


def test_components_below_the_plans_share_are_not_boxed() -> None:
    recorder = Recorder()
    small = _mask((12, 10, 4), (14, 12, 6))
    prompt_generalist(_of(_request(Strategy.BOXES, {K.BOX_2D}, recorder, component_share=0.3), LEFT | small))
    assert {box.bounds for box in recorder.received[0].boxes} == {(2, 1, 8, 5)}


def test_boxes_are_given_on_the_chosen_slices_only() -> None:
    recorder = Recorder()
    request = _of(_request(Strategy.BOXES, {K.BOX_2D}, recorder), LEFT | RIGHT)
    prompt_generalist(replace(request, step=3))
    assert [box.index for box in recorder.received[0].boxes] == [3, 6, 6, 9]


def test_propagated_carries_each_component_on_its_own_and_unites_the_answers() -> None:
    recorder = Recorder(RIGHT, LEFT)
    request = _request(Strategy.PROPAGATED, {K.BOX_2D, K.PROPAGATED}, recorder, span_margin_slices=0)
    (answer,) = prompt_generalist(_of(request, LEFT | RIGHT))
    first, second = recorder.received  # the larger component comes first
    assert ({box.bounds for box in first.boxes}, first.span) == ({(11, 9, 16, 15)}, (4, 10))
    assert ({box.bounds for box in second.boxes}, second.span) == ({(2, 1, 8, 5)}, (2, 7))
    assert torch.equal(answer.probability > 0.5, torch.from_numpy(LEFT | RIGHT))
    assert answer.quality == {0: 0.5}


def test_propagated_prompts_a_connected_class_once() -> None:
    recorder = Recorder()
    request = _request(Strategy.PROPAGATED, {K.BOX_2D, K.PROPAGATED}, recorder, span_margin_slices=0)
    prompt_generalist(_of(request, LEFT | RIGHT, connected=True))
    assert [prompts.span for prompts in recorder.received] == [(2, 10)]


def _wedge() -> np.ndarray:
    """Return a mask that has no pixel (row, column) whose transpose (column, row) is inside, too."""
    mask = np.zeros(SHAPE, bool)
    mask[15:17, 1:10, 3:6] = True
    mask[13:19, 6:10, 3:6] = True
    return mask


@pytest.mark.parametrize("strategy", [Strategy.POINTS, Strategy.SCRIBBLES])
def test_slice_clicks_are_rows_then_columns(strategy: Strategy) -> None:
    recorder = Recorder(_wedge())
    request = _request(strategy, {K.POINTS_2D}, recorder, NEIGHBOUR & ~_wedge(), clicks=1)
    prompt_generalist(_of(request, _wedge()))
    clicks = recorder.received[0].points
    positive = [point for point in clicks if point.positive]
    negative = [point for point in clicks if not point.positive]
    assert {point.position[2] for point in positive} == {3, 4, 5}
    assert {point.position[2] for point in negative} == {3, 4, 5}
    assert all(_wedge()[tuple(int(at) for at in point.position)] for point in positive)
    assert all((NEIGHBOUR & ~_wedge())[tuple(int(at) for at in point.position)] for point in negative)


def test_a_propagated_click_is_row_then_column() -> None:
    recorder = Recorder(_wedge())
    prompt_generalist(_of(_request(Strategy.PROPAGATED, {K.POINTS_2D, K.PROPAGATED}, recorder), _wedge()))
    (click,) = recorder.received[0].points
    assert _wedge()[tuple(int(at) for at in click.position)]


def test_slice_clicks_go_where_the_target_is_deepest_in_millimetres() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[2:9, 2:5, 4] = True  # 7 mm by 6 mm: 1 mm rows, 2 mm columns
    mask[9:13, 2:12, 4] = True  # 4 mm by 20 mm: more voxels to each side along the columns, fewer millimetres
    recorder = Recorder()
    request = _of(_request(Strategy.POINTS, {K.POINTS_2D}, recorder, clicks=1), mask)
    prompt_generalist(request.within(replace(request.region, spacing_mm=(1.0, 2.0, 0.5))))
    (click,) = recorder.received[0].points
    depth = ndimage.distance_transform_edt(np.pad(mask[:, :, 4], 1), sampling=(1.0, 2.0))[1:-1, 1:-1]
    assert depth[int(click.position[0]), int(click.position[1])] == pytest.approx(depth.max())


def test_boxes_are_smoothed_along_the_slices_as_the_plan_says() -> None:
    bad = LEFT.copy()
    bad[2:15, 1:12, 4] = True
    bounds = {}
    for window in (1, 5):
        recorder = Recorder()
        prompt_generalist(_of(_request(Strategy.BOXES, {K.BOX_2D}, recorder, smooth_slices=window), bad))
        bounds[window] = {box.bounds for box in recorder.received[0].boxes}
    assert bounds == {1: {(2, 1, 8, 5), (2, 1, 14, 11)}, 5: {(2, 1, 8, 5)}}
