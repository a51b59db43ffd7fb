"""The queries to SAM's decoder for each slice, from boxes, points and a mask on a scan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists.base import Point, Prompts, SliceBox, VolumeGrid
from semisam_core.generalists.sam_queries import Query, answered_slices, make_queries
from semisam_core.generalists.slices import Framing

SHAPE = (48, 32, 6)
GRID = VolumeGrid(SHAPE, (1.0, 1.0, 1.0))
FRAMING = Framing(96)  # two pixels per voxel
MASK_SIDE = 24  # half a pixel per voxel
LEFT, RIGHT = SliceBox(2, (10, 2, 19, 11)), SliceBox(2, (10, 20, 19, 29))


def _queries(prompts: Prompts) -> list[Query]:
    return make_queries(prompts, GRID, FRAMING, MASK_SIDE)


def _mask(*blocks: tuple[slice, slice, int], value: float = 0.9) -> Tensor:
    mask = torch.full(SHAPE, 0.1)
    for block in blocks:
        mask[block] = value
    return mask


def _at(*points: Point) -> list[tuple[float, float]]:
    return [FRAMING.point(point, SHAPE) for point in points]


def test_box_points_and_mask_on_a_slice_are_one_query() -> None:
    points = (Point((12, 5, 2)), Point((30, 20, 2), positive=False))
    (query,) = _queries(Prompts((LEFT,), points, _mask((slice(10, 20), slice(2, 12), 2))))
    assert (query.index, query.structure) == (2, (True, 2, True))
    assert query.box == FRAMING.box(LEFT, SHAPE)
    assert dict(zip(query.points, query.labels, strict=True)) == dict(zip(_at(*points), (1, 0), strict=True))


def test_a_click_inside_the_object_is_positive_and_one_outside_is_negative() -> None:
    (query,) = _queries(Prompts(points=(Point((9, 3, 1)), Point((2, 8, 1), positive=False))))
    assert dict(zip(query.points, query.labels, strict=True)) == {(7.0, 19.0): 1, (17.0, 5.0): 0}


def test_each_slice_is_a_query_of_its_own() -> None:
    points = (Point((1, 1, 4)), Point((2, 2, 0)), Point((3, 3, 4)))
    assert [(query.index, query.structure) for query in _queries(Prompts((LEFT,), points))] == [
        (0, (False, 1, False)),
        (2, (True, 0, False)),
        (4, (False, 2, False)),
    ]


def test_only_a_single_positive_point_is_ambiguous() -> None:
    point, mask = Point((1, 1, 2)), _mask((slice(0, 9), slice(0, 9), 2))
    sets = {
        "point": Prompts(points=(point,)),
        "points": Prompts(points=(point, Point((2, 2, 2)))),
        "signs": Prompts(points=(point, Point((2, 2, 2), positive=False))),
        "box": Prompts((LEFT,), (point,)),
        "mask": Prompts(points=(point,), mask=mask),
        "only box": Prompts((LEFT,)),
        "only mask": Prompts(mask=mask),
    }
    assert [name for name, prompts in sets.items() if _queries(prompts)[0].ambiguous] == ["point"]


def test_a_slice_with_only_negative_points_is_not_answered() -> None:
    negative = Point((5, 5, 3), positive=False)
    prompts = Prompts(points=(negative, Point((5, 5, 1))), mask=_mask())
    assert [query.index for query in _queries(prompts)] == [1]
    assert answered_slices(prompts, GRID, FRAMING) == (1,)


def test_a_mask_alone_queries_each_slice_with_foreground() -> None:
    mask = _mask((slice(4, 12), slice(4, 12), 1), (slice(20, 28), slice(8, 16), 4))
    mask[0, 0, 3] = 0.5  # not above one half
    queries = _queries(Prompts(mask=mask))
    assert [(query.index, query.structure) for query in queries] == [(1, (False, 0, True)), (4, (False, 0, True))]


def test_a_mask_accompanies_a_prompt_even_on_a_slice_without_foreground() -> None:
    (query,) = _queries(Prompts((LEFT,), mask=_mask()))
    assert query.mask is not None
    assert float(query.mask.max()) == pytest.approx(math.log(0.1 / 0.9), abs=1e-5)


def test_a_mask_becomes_finite_logits() -> None:
    mask = _mask((slice(0, 24), slice(0, 32), 2), value=1.0)
    mask[24:, :, 2] = 0.0
    (query,) = _queries(Prompts(mask=mask))
    assert query.mask is not None
    assert tuple(query.mask.shape) == (1, MASK_SIDE, MASK_SIDE)
    limit = math.log(0.999 / 0.001)
    assert query.mask[0, 0, :16].tolist() == pytest.approx([limit] * 16, abs=1e-3)
    assert query.mask[0, -1, :16].tolist() == pytest.approx([-limit] * 16, abs=1e-3)
    assert float(query.mask[0, :, 16:].max()) < -limit  # the padding is more certain still


def test_each_of_several_boxes_gets_the_points_and_mask_inside_it_and_all_negative_points() -> None:
    inside = {box: Point((15, (box.bounds[1] + box.bounds[3]) / 2, 2)) for box in (LEFT, RIGHT)}
    negative = Point((40, 16, 2), positive=False)
    mask = _mask((slice(0, 48), slice(0, 32), 2))
    queries = _queries(Prompts((RIGHT, LEFT), (*inside.values(), negative), mask))
    assert [query.box for query in queries] == [FRAMING.box(box, SHAPE) for box in (LEFT, RIGHT)]
    for query, box in zip(queries, (LEFT, RIGHT), strict=True):
        assert dict(zip(query.points, query.labels, strict=True)) == dict(
            zip(_at(inside[box], negative), (1, 0), strict=True)
        )
        assert query.mask is not None
        rows, columns = (query.mask[0] > 0).nonzero().unbind(1)
        top, left, bottom, right = (bound / 2 for bound in box.bounds)
        assert (rows.min(), rows.max()) == (pytest.approx(top, abs=1), pytest.approx(bottom, abs=1))
        assert (columns.min(), columns.max()) == (pytest.approx(left, abs=1), pytest.approx(right, abs=1))


@pytest.mark.parametrize(
    ("column", "takers"), [(11.4, [LEFT]), (12.0, [LEFT]), (15.0, [LEFT]), (16.0, [RIGHT]), (15.5, [LEFT, RIGHT])]
)
def test_a_positive_point_outside_all_boxes_belongs_to_the_nearest(column: float, takers: list[SliceBox]) -> None:
    queries = _queries(Prompts((LEFT, RIGHT), (Point((15, column, 2)),)))
    assert [query.box for query in queries if query.points] == [FRAMING.box(box, SHAPE) for box in takers]


def test_a_point_in_two_boxes_belongs_to_both() -> None:
    over = SliceBox(2, (12, 8, 25, 25))
    queries = _queries(Prompts((LEFT, over), (Point((15, 9, 2)),)))
    assert [len(query.points) for query in queries] == [1, 1]


def test_one_box_gets_all_points_of_its_slice() -> None:
    (query,) = _queries(Prompts((LEFT,), (Point((40, 30, 2)), Point((15, 5, 2)))))
    assert len(query.points) == 2


def test_boxes_on_other_slices_do_not_share_points() -> None:
    other = SliceBox(3, RIGHT.bounds)
    queries = _queries(Prompts((LEFT, other), (Point((15, 25, 2)),)))
    assert [(query.index, len(query.points)) for query in queries] == [(2, 1), (3, 0)]


POINTS = st.builds(
    Point,
    st.tuples(st.integers(0, 47), st.integers(0, 31), st.integers(0, 5)),
    st.booleans(),
)
BOXES = st.builds(
    lambda index, top, left, height, width: SliceBox(index, (top, left, top + height, left + width)),
    *(st.integers(0, limit) for limit in (5, 40, 24, 7, 7)),
)


@settings(deadline=None, max_examples=50)
@given(boxes=st.lists(BOXES, max_size=5), points=st.lists(POINTS, max_size=8), data=st.data())
def test_the_order_of_prompts_changes_nothing(boxes: list[SliceBox], points: list[Point], data: Any) -> None:
    shuffled = Prompts(
        tuple(data.draw(st.permutations(boxes))), tuple(data.draw(st.permutations(points))), mask=_mask()
    )
    one, other = _queries(Prompts(tuple(boxes), tuple(points), mask=_mask())), _queries(shuffled)
    assert [(each.index, each.box, each.points, each.labels) for each in one] == [
        (each.index, each.box, each.points, each.labels) for each in other
    ]


@settings(deadline=None, max_examples=50)
@given(boxes=st.lists(BOXES, max_size=5), points=st.lists(POINTS, max_size=8))
def test_every_box_is_queried_once_and_no_point_of_an_answered_slice_is_lost(
    boxes: list[SliceBox], points: list[Point]
) -> None:
    prompts = Prompts(tuple(boxes), tuple(points))
    queries = _queries(prompts)
    answered = {box.index for box in boxes} | {point.position[2] for point in points if point.positive}
    assert {query.index for query in queries} == answered == set(answered_slices(prompts, GRID, FRAMING))
    asked = [(query.index, query.box) for query in queries if query.box is not None]
    assert sorted(asked) == sorted((box.index, FRAMING.box(box, SHAPE)) for box in boxes)
    for point in points:
        if point.position[2] in answered:
            here = [each for query in queries if query.index == point.position[2] for each in query.points]
            assert FRAMING.point(point, SHAPE) in here


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (Prompts((SliceBox(6, (0, 0, 5, 5)),)), "slice 6; this scan has slices 0 to 5"),
        (Prompts((SliceBox(0, (50, 0, 55, 5)),)), "lies outside the 48 x 32 slice"),
        (Prompts((SliceBox(0, (5, 0, 4, 5)),)), "is empty"),
        (Prompts(points=(Point((1, 1, 1.5)),)), "whole slice"),
        (Prompts(points=(Point((1, 32, 1)),)), "outside the scan"),
        (Prompts(points=(Point((1, 1, math.nan), positive=False),)), "outside the scan"),
        (Prompts(mask=torch.zeros(48, 32)), r"must have the scan's shape \(48, 32, 6\), not \(48, 32\)"),
        (Prompts(mask=torch.full(SHAPE, 1.5)), "must be a probability"),
        (Prompts(mask=torch.full(SHAPE, math.nan)), "must be a probability"),
    ],
)
def test_prompts_off_the_scan_are_refused(prompts: Prompts, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _queries(prompts)
    with pytest.raises(ValueError, match=says):
        answered_slices(prompts, GRID, FRAMING)
