"""Scores of a prediction against a label: overlaps, distances in millimetres, and empty masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.evaluation import ClassScore, Summary, dice_of, score_case, summarise

SPACING = (1.0, 2.0, 0.5)
SHAPE = (24, 20, 40)


def _cube(shift: tuple[int, int, int] = (0, 0, 0), side: int = 8) -> Tensor:
    volume = torch.zeros(SHAPE, dtype=torch.uint8)
    region = tuple(slice(5 + step, 5 + step + side) for step in shift)
    volume[region] = 1
    return volume


def _score(prediction: Tensor, label: Tensor, tolerance_mm: float = 1.0) -> ClassScore:
    (score,) = score_case(prediction, label, 1, SPACING, tolerance_mm)
    assert score is not None
    return score


def _random(seed: int, classes: int, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    classed = torch.randint(1, classes + 1, (4, 5, 3), generator=generator)
    return classed * (torch.rand((4, 5, 3), generator=generator) < density)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), density=st.floats(0.2, 1.0), classes=st.integers(1, 3))
def test_dice_and_jaccard_match_set_arithmetic(seed: int, density: float, classes: int) -> None:
    prediction, label = _random(seed, classes, density), _random(seed + 1, classes, density)
    scores = score_case(prediction, label, classes, SPACING, 1.0)
    assert len(scores) == classes
    for k, score in enumerate(scores, start=1):
        ours, theirs = ({tuple(place) for place in (each == k).nonzero().tolist()} for each in (prediction, label))
        if not ours | theirs:
            assert score is None
            continue
        assert score is not None
        assert score.dice == pytest.approx(2 * len(ours & theirs) / (len(ours) + len(theirs)))
        assert score.jaccard == pytest.approx(len(ours & theirs) / len(ours | theirs))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), density=st.floats(0.3, 1.0))
def test_scores_are_symmetric(seed: int, density: float) -> None:
    one, other = _random(seed, 1, density), _random(seed + 1, 1, density)
    assume(bool(one.any()) and bool(other.any()))
    forward, backward = _score(one, other), _score(other, one)
    assert forward.dice == backward.dice
    assert forward.hd95_mm == pytest.approx(backward.hd95_mm)
    assert forward.asd_mm == pytest.approx(backward.asd_mm)
    assert forward.surface_dice == pytest.approx(backward.surface_dice)


def test_a_perfect_prediction_has_perfect_scores() -> None:
    assert _score(_cube(), _cube()) == ClassScore(1.0, 1.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("axis", "voxels"), [(0, 3), (1, 2), (2, 6), (2, -4)])
def test_hd95_of_a_shifted_cube_is_the_shift_in_millimetres(axis: int, voxels: int) -> None:
    shift = [0, 0, 0]
    shift[axis] = voxels
    score = _score(_cube((shift[0], shift[1], shift[2])), _cube())
    assert score.hd95_mm == pytest.approx(abs(voxels) * SPACING[axis])


@pytest.mark.parametrize("shift", [(2, 0, 0), (0, 1, 0), (0, 0, 5), (1, 1, 1)])
def test_asd_is_the_mean_distance_between_surfaces(shift: tuple[int, int, int]) -> None:
    one, other = _cube(shift), _cube()
    assert _score(one, other).asd_mm == pytest.approx(_brute_force_asd(one, other), rel=1e-4)


def _brute_force_distances(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of every surface voxel to the other surface, for both surfaces, in mm."""
    surfaces = [_surface(each) * torch.tensor(SPACING) for each in (one, other)]
    distances = torch.cdist(surfaces[0], surfaces[1])
    return distances.amin(1), distances.amin(0)


def _brute_force_asd(one: Tensor, other: Tensor) -> float:
    return float(torch.cat(_brute_force_distances(one, other)).mean())


def _brute_force_hd95(one: Tensor, other: Tensor) -> float:
    return max(float(torch.quantile(each, 0.95)) for each in _brute_force_distances(one, other))


@settings(deadline=None, max_examples=15)
@given(shift=st.tuples(*(st.integers(0, 4) for _ in range(3))), side=st.integers(2, 8))
def test_hd95_is_the_95th_percentile_of_distances_between_surfaces(shift: tuple[int, int, int], side: int) -> None:
    one, other = _cube(shift, side), _cube()
    one[22, 18, 38] = 1
    assert _score(one, other).hd95_mm == pytest.approx(_brute_force_hd95(one, other), rel=1e-4, abs=1e-4)


def test_one_stray_voxel_does_not_change_hd95() -> None:
    stray = _cube()
    stray[22, 18, 38] = 1
    assert _score(stray, _cube()).hd95_mm == 0.0


def _surface(mask: Tensor) -> Tensor:
    """Return the voxels with one of their six neighbours outside, (N, 3)."""
    inner = mask.bool()
    for axis in range(3):
        inner = inner & mask.bool().roll(1, axis) & mask.bool().roll(-1, axis)
    return (mask.bool() & ~inner).nonzero().float()


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_distances_scale_with_the_voxel(scale: float) -> None:
    one, other = _cube((2, 1, 3)), _cube()
    near = _score(one, other)
    (far,) = score_case(one, other, 1, [scale * side for side in SPACING], 1.0)
    assert far is not None
    assert near.hd95_mm is not None
    assert near.asd_mm is not None
    assert far.hd95_mm == pytest.approx(scale * near.hd95_mm)
    assert far.asd_mm == pytest.approx(scale * near.asd_mm, rel=1e-4)
    assert far.dice == near.dice


def test_surface_dice_ignores_distances_within_the_tolerance() -> None:
    assert _score(_cube((1, 0, 0)), _cube(), tolerance_mm=1.5).surface_dice == pytest.approx(1.0)
    strict = _score(_cube((1, 0, 0)), _cube(), tolerance_mm=0.5).surface_dice
    assert strict is not None
    assert 0 < strict < 1


@example(place=(0, 0, 0))
@example(place=(16, 12, 32))
@settings(deadline=None, max_examples=15)
@given(place=st.tuples(st.integers(0, 16), st.integers(0, 12), st.integers(0, 32)))
def test_scores_do_not_depend_on_position(place: tuple[int, int, int]) -> None:
    def placed(grow: int) -> Tensor:
        volume = torch.zeros(SHAPE, dtype=torch.uint8)
        volume[tuple(slice(start, start + 6 + grow) for start in place)] = 1
        return volume

    centred = torch.zeros((30, 30, 60), dtype=torch.uint8)
    larger = centred.clone()
    centred[10:16, 10:16, 10:16] = 1
    larger[10:18, 10:18, 10:18] = 1
    assert _score(placed(0), placed(2)) == _score(centred, larger)


def test_an_empty_prediction_has_no_overlap_and_no_distances() -> None:
    score = _score(torch.zeros(SHAPE), _cube())
    assert (score.dice, score.jaccard, score.surface_dice) == (0.0, 0.0, 0.0)
    assert score.hd95_mm is None
    assert score.asd_mm is None


def test_a_prediction_where_the_label_is_empty_has_no_overlap_and_no_distances() -> None:
    assert _score(_cube(), torch.zeros(SHAPE)) == ClassScore(0.0, 0.0, None, None, 0.0)


def test_a_class_absent_from_both_is_not_scored() -> None:
    assert score_case(2 * _cube(), 2 * _cube(), 3, SPACING, 1.0) == [None, ClassScore(1.0, 1.0, 0.0, 0.0, 1.0), None]


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction \(2, 3, 4\) and label \(4, 3, 2\) differ in shape"):
        score_case(torch.zeros(2, 3, 4), torch.zeros(4, 3, 2), 1, SPACING, 1.0)


def test_a_case_without_distances_counts_as_missing_not_as_zero() -> None:
    scores = [ClassScore(0.8, 0.6, 4.0, 1.0, 0.9), ClassScore(0.0, 0.0, None, None, 0.0), None]
    assert summarise(scores) == Summary(
        dice=pytest.approx(0.4),
        jaccard=pytest.approx(0.3),
        hd95_mm=4.0,
        asd_mm=1.0,
        surface_dice=pytest.approx(0.45),
        cases=2,
        missing_distances=1,
    )


def test_a_summary_has_no_distances_if_no_case_has_any() -> None:
    summary = summarise([ClassScore(0.0, 0.0, None, None, 0.0)] * 2)
    assert summary == Summary(0.0, 0.0, None, None, 0.0, cases=2, missing_distances=2)


@pytest.mark.parametrize("scores", [[], [None, None]])
def test_a_class_that_no_case_has_gets_no_summary(scores: list[ClassScore | None]) -> None:
    assert summarise(scores) is None


@settings(deadline=None, max_examples=25)
@given(dices=st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_a_summary_is_the_mean_over_cases(dices: list[float]) -> None:
    summary = summarise([ClassScore(dice, dice / 2, 10 * dice, dice, dice) for dice in dices])
    assert summary is not None
    assert summary.cases == len(dices)
    assert math.isclose(summary.dice, sum(dices) / len(dices), abs_tol=1e-9)
    assert summary.hd95_mm == pytest.approx(10 * sum(dices) / len(dices))


def test_two_empty_masks_overlap_fully() -> None:
    empty, full = torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    assert dice_of(empty, empty) == 1.0
    assert dice_of(empty, full) == 0.0
    assert dice_of(full, full) == 1.0
