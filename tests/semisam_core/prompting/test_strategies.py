"""Each strategy puts the prompts it is named for, stops in time, and can be answered by a model that takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists.base import PromptKind, Prompts, Segmentation
from semisam_core.plan_sections.pseudo_labels import USABLE_KINDS, Prompting, Strategy
from semisam_core.prompting import PromptRequest, Region, consult
from semisam_core.prompting.strategies import prompted_slices

SHAPE = (20, 18, 12)
SPACING = (2.0, 2.0, 4.0)
K = PromptKind


def _mask(low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    return mask


TARGET = _mask((3, 4, 2), (9, 12, 7))
NEIGHBOUR = _mask((11, 4, 1), (17, 12, 7))


class Listener:
    """A generalist that notes what it is asked and answers with given masks, one after another, then the last again."""

    def __init__(self, *answers: np.ndarray) -> None:
        self._answers = [torch.from_numpy(answer).float() for answer in answers or (TARGET,)]
        self.heard: list[Prompts] = []

    def __call__(self, prompts: Prompts) -> Segmentation:
        answer = self._answers[min(len(self.heard), len(self._answers) - 1)]
        self.heard.append(prompts)
        return Segmentation(answer, {0: 0.5})


def _question(
    strategy: Strategy, kinds: set[PromptKind], ask: Listener, others: np.ndarray | None = None, **settings: object
) -> PromptRequest:
    region = Region(TARGET, np.zeros(SHAPE, bool) if others is None else others, SPACING)
    probability = torch.from_numpy(TARGET).float() * 0.8 + 0.1
    prompting = Prompting(strategy=strategy, smooth_slices=1).model_copy(update=settings)
    return PromptRequest(region, probability, frozenset(kinds), prompting, ask)


def _inside(prompts: Prompts, mask: np.ndarray) -> list[bool]:
    return [bool(mask[tuple(round(p) for p in point.position)]) for point in prompts.points]


def test_boxes_puts_one_box_a_slice_with_the_middle_margin() -> None:
    listener = Listener()
    answers = consult(_question(Strategy.BOXES, {K.BOX_2D}, listener, margins_mm=(-2.0, 0.0, 4.0)))
    (prompts,) = listener.heard
    assert len(answers) == 1
    assert [box.index for box in prompts.boxes] == [2, 3, 4, 5, 6, 7]
    assert {box.bounds for box in prompts.boxes} == {(3.0, 4.0, 9.0, 12.0)}


def test_uncertainty_rectified_puts_a_set_of_boxes_for_each_margin() -> None:
    listener = Listener()
    answers = consult(_question(Strategy.UNCERTAINTY_RECTIFIED, {K.BOX_2D}, listener, margins_mm=(-2.0, 0.0, 4.0)))
    assert len(answers) == 3
    tops = [each.boxes[0].bounds[0] for each in listener.heard]
    assert tops == [4.0, 3.0, 1.0]


@pytest.mark.parametrize("kinds", [{K.POINTS_3D}, {K.POINTS_2D}, {K.MASK_3D}, {K.MASK_2D}])
def test_uncertainty_rectified_asks_models_without_boxes_about_grown_regions(kinds: set[PromptKind]) -> None:
    listener = Listener()
    question = _question(Strategy.UNCERTAINTY_RECTIFIED, kinds, listener, margins_mm=(-4.0, 0.0, 4.0), clicks=1)
    assert len(consult(question)) == 3


def test_mask_puts_the_specialists_probability_and_says_background_outside_of_the_region() -> None:
    listener = Listener()
    question = _question(Strategy.MASK, {K.MASK_3D}, listener)
    speck = question.probability.clone()
    speck[19, 17, 11] = 0.99  # a component that is not prompted
    consult(replace(question, probability=speck))
    mask = listener.heard[0].mask
    assert mask is not None
    assert torch.equal(mask > 0.5, torch.from_numpy(TARGET))


def test_points_in_the_volume_follow_the_largest_error_and_carry_the_last_answer() -> None:
    listener = Listener(TARGET | NEIGHBOUR, TARGET)
    answers = consult(_question(Strategy.POINTS, {K.POINTS_3D, K.MASK_3D}, listener, clicks=5))
    first, second = listener.heard  # the second answer agrees, so that no third click is made
    assert [point.positive for point in first.points] == [True]
    assert _inside(first, TARGET) == [True]
    assert [point.positive for point in second.points] == [True, False]
    assert _inside(second, NEIGHBOUR & ~TARGET) == [False, True]
    assert first.mask is None
    assert second.mask is not None
    assert torch.equal(second.mask > 0.5, torch.from_numpy(TARGET | NEIGHBOUR))
    assert len(answers) == 1


def test_points_end_after_the_last_click_even_if_nothing_agrees() -> None:
    listener = Listener(np.zeros(SHAPE, bool))
    consult(_question(Strategy.POINTS, {K.POINTS_3D}, listener, clicks=3))
    # A click that was given before is not given again, so there may be fewer.
    assert 1 <= len(listener.heard) <= 3
    assert len({point.position for point in listener.heard[-1].points}) == len(listener.heard[-1].points)


def test_points_for_a_slice_wise_model_click_on_each_slice() -> None:
    listener = Listener()
    consult(_question(Strategy.POINTS, {K.POINTS_2D}, listener))
    assert sorted(point.position[2] for point in listener.heard[0].points) == [2, 3, 4, 5, 6, 7]
    assert all(_inside(listener.heard[0], TARGET))


def test_the_state_of_one_question_does_not_reach_the_next() -> None:
    fresh, used = Listener(), Listener()
    consult(_question(Strategy.POINTS, {K.POINTS_3D}, used))
    consult(_question(Strategy.POINTS, {K.POINTS_3D}, used))
    consult(_question(Strategy.POINTS, {K.POINTS_3D}, fresh))
    assert used.heard[-1].points == fresh.heard[-1].points


def test_scribbles_put_many_positive_clicks_along_the_skeleton() -> None:
    listener = Listener()
    question = _question(Strategy.SCRIBBLES, {K.POINTS_3D}, listener, scribble_points=6)
    vessel = _mask((3, 4, 2), (5, 16, 4))
    consult(question.within(replace(question.region, mask=vessel)))
    points = listener.heard[0].points
    assert 1 < len(points) <= 6
    assert all(_inside(listener.heard[0], vessel))
    assert all(point.positive for point in points)


def test_propagated_prompts_the_widest_slice_and_spans_the_region() -> None:
    listener = Listener()
    question = _question(Strategy.PROPAGATED, {K.BOX_2D, K.PROPAGATED}, listener, span_margin_slices=2)
    question.region.mask[3:12, 4:13, 5] = True
    try:
        consult(question)
    finally:
        question.region.mask[10:12, 4:13, 5] = False
    (prompts,) = listener.heard
    assert [box.index for box in prompts.boxes] == [5]
    assert prompts.span == (0, 9)


@pytest.mark.parametrize("kinds", [{K.POINTS_3D}, {K.POINTS_2D}, {K.POINTS_2D, K.BOX_2D}])
@pytest.mark.parametrize("aware", [True, False])
def test_other_classes_are_negative_clicks_where_the_plan_is_class_aware(kinds: set[PromptKind], aware: bool) -> None:
    listener = Listener()
    strategy = Strategy.BOXES if K.BOX_2D in kinds else Strategy.POINTS
    consult(_question(strategy, kinds, listener, NEIGHBOUR, class_aware=aware))
    negative = [point for point in listener.heard[0].points if not point.positive]
    assert bool(negative) == aware
    assert all(NEIGHBOUR[tuple(round(p) for p in point.position)] for point in negative)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), step=st.integers(1, 5))
def test_prompted_slices_lie_on_one_lattice_and_each_run_has_one(seed: int, step: int) -> None:
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
def test_every_strategy_can_be_answered_by_every_kind_it_is_said_to_need(strategy: Strategy, step: int) -> None:
    for kind in USABLE_KINDS[strategy]:
        listener = Listener()
        kinds = {kind, K.BOX_2D} if kind is K.PROPAGATED else {kind}
        answers = consult(replace(_question(strategy, kinds, listener), step=step))
        assert answers
        for prompts in listener.heard:
            assert _used(prompts) <= kinds | {K.MASK_2D, K.MASK_3D}


def _used(prompts: Prompts) -> set[PromptKind]:
    used: set[PromptKind] = set()
    if prompts.boxes:
        used.add(K.BOX_2D)
    if prompts.span:
        used.add(K.PROPAGATED)
    return used


def test_a_slice_wise_mask_prompt_has_foreground_on_the_asked_slices_only() -> None:
    listener = Listener()
    consult(replace(_question(Strategy.MASK, {K.MASK_2D}, listener), step=3))
    mask: Tensor | None = listener.heard[0].mask
    assert mask is not None
    assert listener.heard[0].slices() == (3, 6)
