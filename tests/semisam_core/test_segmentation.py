"""From probabilities to the segmentation that is scored and shown: connected classes keep their largest component."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.inference import segmentation
from semisam_core.plan import Plan
from tests.conftest import tiny_plan

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
NEIGHBOURS = [step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)]
Voxel = tuple[int, ...]


def _plan(*connected: bool) -> Plan:
    """Return a plan with one class per argument."""
    classes = [f"{{name: c{k}, value: {k}, connected: {str(each).lower()}}}" for k, each in enumerate(connected, 1)]
    return tiny_plan(f"task.classes=[{', '.join(classes)}]")


def _probability(indices: Tensor, classes: int) -> Tensor:
    """Return probabilities (1 + K, H, W, D) that favour these class indices, with the next class second."""
    first = torch.nn.functional.one_hot(indices.long(), 1 + classes).movedim(-1, 0).float()
    return 0.6 * first + 0.4 * first.roll(1, 0)


def _random_indices(shape: tuple[int, int, int], seed: int, classes: int) -> Tensor:
    """Return class indices that are mostly background, with islands of many sizes."""
    random = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return ((random - 0.6).clamp(min=0) / 0.4 * (classes + 1)).long().clamp(max=classes)


def _components(indices: Tensor, k: int) -> list[set[Voxel]]:
    """Return the components of a class by flood fill, ordered by their first voxel in the array."""
    left = {tuple(voxel) for voxel in (indices == k).nonzero().tolist()}
    components = []
    while left:
        component, border = set(), {min(left)}
        while border:
            component |= border
            near = {tuple(a + b for a, b in zip(voxel, step, strict=True)) for voxel in border for step in NEIGHBOURS}
            border = (near & left) - component
        components.append(component)
        left -= component
    return components


def _reference(indices: Tensor, plan: Plan) -> Tensor:
    expected = indices.clone()
    for k, target in enumerate(plan.task.classes, start=1):
        components = _components(indices, k) if target.connected else []
        largest = max(components, key=len, default=set())
        for voxel in set().union(*components) - largest:
            expected[voxel] = 0
    return expected


@settings(deadline=None, max_examples=200)
@given(
    shape=SHAPES, seed=st.integers(0, 2**31 - 1), connected=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple)
)
def test_connected_classes_keep_their_largest_component_and_other_classes_keep_all(
    shape: tuple[int, int, int], seed: int, connected: tuple[bool, ...]
) -> None:
    plan = _plan(*connected)
    indices = _random_indices(shape, seed, len(connected))
    found = segmentation(_probability(indices, len(connected)), plan)
    assert found.dtype == torch.int64
    assert torch.equal(found, _reference(indices, plan))


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, seed=st.integers(0, 2**31 - 1))
def test_without_connected_classes_each_voxel_gets_its_most_probable_class(
    shape: tuple[int, int, int], seed: int
) -> None:
    probability = torch.rand((3, *shape), generator=torch.Generator().manual_seed(seed)).softmax(0)
    assert torch.equal(segmentation(probability, _plan(False, False)), probability.argmax(0))


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, seed=st.integers(0, 2**31 - 1))
def test_segmentation_is_idempotent(shape: tuple[int, int, int], seed: int) -> None:
    plan = _plan(True, True)
    once = segmentation(_probability(_random_indices(shape, seed, 2), 2), plan)
    assert torch.equal(segmentation(_probability(once, 2), plan), once)


def test_only_islands_of_connected_classes_are_removed() -> None:
    indices = torch.zeros(12, 6, 4, dtype=torch.long)
    indices[1:4, 1:4, 1:3], indices[8, 1, 1] = 1, 1
    indices[1:4, 5, 1:3], indices[8, 4, 1] = 2, 2
    found = segmentation(_probability(indices, 2), _plan(True, False))
    assert int(found[8, 1, 1]) == 0
    assert int(found[8, 4, 1]) == 2
    assert torch.equal(found[:8], indices[:8])


def test_removed_islands_become_background_even_if_another_class_comes_second() -> None:
    probability = torch.zeros(3, 5, 1, 1)
    probability[:, :, 0, 0] = torch.tensor(
        [[0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.8, 0.1, 0.1], [0.1, 0.5, 0.4], [1, 0, 0]]
    ).T
    assert segmentation(probability, _plan(True, True)).flatten().tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("step", NEIGHBOURS)
def test_voxels_that_share_a_face_an_edge_or_a_corner_are_connected(step: Voxel) -> None:
    indices = torch.zeros(3, 3, 3, dtype=torch.long)
    indices[1, 1, 1] = 1
    indices[tuple(1 + each for each in step)] = 1
    assert torch.equal(segmentation(_probability(indices, 1), _plan(True)), indices)


def test_touching_components_of_different_classes_stay_apart() -> None:
    indices = torch.tensor([1, 1, 2, 1, 2, 2]).reshape(6, 1, 1)
    assert segmentation(_probability(indices, 2), _plan(True, True)).flatten().tolist() == [1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_among_equal_components_the_first_in_the_array_stays(axis: int) -> None:
    indices = torch.zeros(7, 7, 7, dtype=torch.long)
    for start in (4, 1):
        indices.narrow(axis, start, 2)[2:4, 2:4, 2:4] = 1
    first = indices.clone()
    first.narrow(axis, 4, 3).zero_()
    probability = _probability(indices, 1)
    found = [segmentation(probability, _plan(True)) for _ in range(3)]
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(found[0], first)


def test_an_absent_class_stays_absent() -> None:
    indices = torch.zeros(4, 4, 4, dtype=torch.long)
    assert torch.equal(segmentation(_probability(indices, 2), _plan(True, True)), indices)
    indices[0, 0, 0] = 2
    assert torch.equal(segmentation(_probability(indices, 2), _plan(True, True)), indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_scan_of_one_voxel_is_segmented_at_any_precision(dtype: torch.dtype) -> None:
    probability = torch.tensor([0.25, 0.75], dtype=dtype).reshape(2, 1, 1, 1)
    assert segmentation(probability, _plan(True)).tolist() == [[[1]]]


def test_the_probabilities_are_not_modified() -> None:
    indices = _random_indices((6, 6, 4), 3, 2)
    probability = _probability(indices, 2)
    before = probability.clone()
    segmentation(probability, _plan(True, True))
    assert torch.equal(probability, before)
