"""How scans, clicks, masks and answers map to the cubes of a 3D encoder, and which cubes answer a prompt set."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from torch import Tensor

from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_scan
from semisam_core.generalists.base import Point, Prompts, VolumeGrid
from semisam_core.generalists.crops import CropLattice, axis_cover, axis_starts, crop_prompts
from tests.conftest import tiny_plan, write_nifti

SIDE = 32
AXES = st.permutations(["RL", "AP", "SI"]).flatmap(lambda pairs: st.tuples(*(st.sampled_from(pair) for pair in pairs)))


@st.composite
def grids(draw: Any) -> VolumeGrid:
    """Draw scans of 9 to 90 mm (6 to 60 resampled voxels, cubes have 32) with voxels of any proportions."""
    spacing = draw(st.tuples(*[st.floats(0.6, 3.0)] * 3))
    h, w, d = (max(4, round(draw(st.floats(9, 90)) / mm)) for mm in spacing)
    return VolumeGrid((h, w, d), spacing)


@st.composite
def voxels(draw: Any, grid: VolumeGrid) -> tuple[int, int, int]:
    h, w, d = (draw(st.integers(0, length - 1)) for length in grid.shape)
    return h, w, d


def _lattice(*shape: int) -> CropLattice:
    """Return the cubes of a scan that has 1.5 mm voxels already."""
    h, w, d = shape
    return CropLattice(VolumeGrid((h, w, d), (1.5, 1.5, 1.5)), SIDE)


def _places(lattice: CropLattice) -> list[Tensor]:
    """Return, for each axis, a scan (H, W, D) whose voxels contain their own coordinate in the resampled scan."""
    h, w, d = ((torch.arange(n) + 0.5) * s for n, s in zip(lattice.grid.shape, lattice.scale, strict=True))
    return list(torch.meshgrid(h, w, d, indexing="ij"))


@settings(deadline=None, max_examples=50)
@given(grid=grids())
def test_a_resampled_scan_has_the_scans_length_to_within_half_a_voxel(grid: VolumeGrid) -> None:
    lattice = CropLattice(grid, SIDE)
    for new, old, mm in zip(lattice.size, grid.shape, grid.spacing_mm, strict=True):
        assert abs(new * lattice.spacing_mm - old * mm) <= lattice.spacing_mm / 2 + 1e-9
    assert tuple(lattice.resample(torch.zeros(grid.shape)).shape) == lattice.size


def test_a_scan_thinner_than_half_a_voxel_keeps_one() -> None:
    assert CropLattice(VolumeGrid((1, 40, 2), (0.5, 0.6, 0.3)), SIDE).size == (1, 16, 1)


@given(length=st.integers(1, 128))
def test_a_short_axis_has_one_centred_cube(length: int) -> None:
    (start,) = axis_starts(length, 128)
    before, after = -start, 128 + start - length
    assert before >= 0
    assert before - after in (0, 1)


@given(length=st.integers(129, 600))
def test_along_a_long_axis_cubes_start_every_quarter_of_a_side_and_end_with_the_scan(length: int) -> None:
    starts = axis_starts(length, 128)
    assert starts[0] == 0
    assert starts[-1] == length - 128
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert set(steps[:-1]) <= {32}
    assert 1 <= steps[-1] <= 32


def test_cubes_are_numbered_along_the_last_axis_first() -> None:
    lattice = _lattice(33, 40, 50)
    assert lattice.starts == ((0, 1), (0, 8), (0, 8, 16, 18))
    assert [lattice.origin(unit) for unit in range(len(lattice))] == list(itertools.product(*lattice.starts))


@pytest.mark.parametrize("unit", [-1, 16])
def test_a_cube_that_does_not_exist_is_refused(unit: int) -> None:
    with pytest.raises(ValueError, match=f"there is no crop {unit}; this scan has crops 0 to 15"):
        _lattice(33, 40, 50).origin(unit)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((0, 4, 4), (1.0, 1.0, 1.0)), ((4, 4, 4), (1.0, 0.0, 1.0)), ((4, 4, 4), (1.0, 1.0, math.nan))],
)
def test_a_grid_without_voxels_or_sizes_is_refused(shape: Any, spacing: Any) -> None:
    with pytest.raises(ValueError, match="cannot be resampled; it needs at least one voxel along each axis"):
        CropLattice(VolumeGrid(shape, spacing), SIDE)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), grid=grids())
def test_a_click_on_a_voxel_maps_to_that_voxel_in_its_cube(data: Any, grid: VolumeGrid) -> None:
    lattice, voxel = CropLattice(grid, SIDE), data.draw(voxels(grid))
    ((unit, clicks),) = crop_prompts(lattice, Prompts(points=(Point(voxel),))).items()
    (position,) = clicks.positions
    for axis, places in enumerate(_places(lattice)):
        cube = lattice.cut(lattice.resample(places), unit)
        nearest = tuple(min(max(round(at), 0), SIDE - 1) for at in position)
        # Upsampling repeats the outermost voxels of the scan over at most half a voxel.
        tolerance = 0.5 + 0.5 * max(lattice.scale[axis], 1)
        assert float(cube[nearest]) == pytest.approx(float(places[voxel]), abs=tolerance + 1e-3)


@settings(deadline=None, max_examples=40)
@given(grid=grids())
def test_resampling_shifts_nothing(grid: VolumeGrid) -> None:
    lattice = CropLattice(grid, SIDE)
    for axis, places in enumerate(_places(lattice)):
        resampled = lattice.resample(places).movedim(axis, 0)
        expected = torch.arange(lattice.size[axis]) + 0.5
        inner = (expected >= lattice.scale[axis] / 2) & (expected <= lattice.size[axis] - lattice.scale[axis] / 2)
        assert torch.allclose(resampled[inner], expected[inner][:, None, None].expand_as(resampled[inner]), atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), grid=grids())
def test_a_blob_lies_in_its_cube_around_its_click_with_zeros_beyond_the_scan(data: Any, grid: VolumeGrid) -> None:
    lattice, voxel = CropLattice(grid, SIDE), data.draw(voxels(grid))
    ((unit, clicks),) = crop_prompts(lattice, Prompts(points=(Point(voxel),))).items()
    cube = lattice.cut(lattice.resample(_blob(lattice, lattice.place(Point(voxel)))), unit)
    (position,) = clicks.positions
    expected = _gaussian([torch.arange(SIDE) - at for at in position])
    for axis, (start, length) in enumerate(zip(lattice.origin(unit), lattice.size, strict=True)):
        beyond = (torch.arange(SIDE) + start < 0) | (torch.arange(SIDE) + start >= length)
        expected.movedim(axis, 0)[beyond] = 0
    assert torch.allclose(cube, expected, atol=0.1)
    assert not cube[expected == 0].any()


def _blob(lattice: CropLattice, place: tuple[float, float, float]) -> Tensor:
    """Return a scan with a blob at a place of the resampled scan."""
    return _gaussian(
        [(torch.arange(n) + 0.5) * s - at for n, s, at in zip(lattice.grid.shape, lattice.scale, place, strict=True)]
    )


def _gaussian(distances: list[Tensor], sigma: float = 4.0) -> Tensor:
    h, w, d = (torch.exp(-(distance**2) / (2 * sigma**2)) for distance in distances)
    return h[:, None, None] * w[:, None] * d


def _profile(mass: Tensor, axis: int) -> Tensor:
    return mass.sum(dim=tuple(other for other in range(3) if other != axis))


@settings(deadline=None, max_examples=25)
@given(data=st.data(), grid=grids())
def test_an_answer_maps_back_to_where_it_was_given(data: Any, grid: VolumeGrid) -> None:
    lattice = CropLattice(grid, SIDE)
    place = data.draw(st.tuples(*(st.floats(0, n) for n in lattice.size)))
    blob = _blob(lattice, place)
    everywhere = {unit: lattice.cut(lattice.resample(blob), unit) for unit in range(len(lattice))}
    assert torch.allclose(lattice.restore(everywhere), blob, atol=0.1)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), grid=grids())
def test_an_answer_in_one_cube_is_complete_inside_and_zero_outside(data: Any, grid: VolumeGrid) -> None:
    lattice = CropLattice(grid, SIDE)
    unit = data.draw(st.integers(0, len(lattice) - 1))
    answer = lattice.restore({unit: torch.ones(SIDE, SIDE, SIDE)})
    assert tuple(answer.shape) == grid.shape
    inside = torch.ones(grid.shape, dtype=torch.bool)
    outside = torch.zeros(grid.shape, dtype=torch.bool)
    for places, start, scale in zip(_places(lattice), lattice.origin(unit), lattice.scale, strict=True):
        margin = 0.5 + scale / 2  # interpolation reaches that far
        inside &= (places >= start + margin) & (places <= start + SIDE - margin)
        outside |= (places <= start - margin) | (places >= start + SIDE + margin)
    assert bool((answer[inside] == 1).all())
    assert not answer[outside].any()


def test_where_cubes_overlap_their_answers_are_averaged() -> None:
    lattice = _lattice(48, 32, 32)
    answer = lattice.restore({0: torch.full((SIDE,) * 3, 0.2), 2: torch.full((SIDE,) * 3, 0.6)})
    assert lattice.starts[0] == (0, 8, 16)
    assert torch.allclose(answer[:16], torch.tensor(0.2))
    assert torch.allclose(answer[16:32], torch.tensor(0.4))
    assert torch.allclose(answer[32:], torch.tensor(0.6))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), grid=grids())
def test_a_window_contains_the_voxels_whose_centres_are_in_the_cube(data: Any, grid: VolumeGrid) -> None:
    lattice = CropLattice(grid, SIDE)
    unit = data.draw(st.integers(0, len(lattice) - 1))
    expected = torch.ones(grid.shape, dtype=torch.bool)
    for axis, start in enumerate(lattice.origin(unit)):
        centres = (torch.arange(grid.shape[axis], dtype=torch.float64) + 0.5) * lattice.scale[axis]
        assume(not bool(torch.isclose(centres, torch.tensor(float(start)).double()).any()))
        assume(not bool(torch.isclose(centres, torch.tensor(float(start + SIDE)).double()).any()))
        held = (centres >= start) & (centres < start + SIDE)
        expected &= held.reshape([-1 if other == axis else 1 for other in range(3)])
    found = torch.zeros(grid.shape, dtype=torch.bool)
    found[lattice.window(unit)] = True
    assert torch.equal(found, expected)


INTERVALS = st.integers(1, 700).flatmap(
    lambda length: st.tuples(st.just(length), st.tuples(*[st.floats(0, length)] * 2).map(sorted))
)


@settings(deadline=None, max_examples=200)
@given(drawn=INTERVALS)
def test_cubes_cover_the_interval_without_a_gap(drawn: tuple[int, list[float]]) -> None:
    length, (low, high) = drawn
    starts = [axis_starts(length, 128)[index] for index in axis_cover(low, high, axis_starts(length, 128), 128)]
    assert starts == sorted(set(starts))
    assert starts[0] <= low
    assert starts[-1] + 128 >= high
    assert all(after <= before + 128 for before, after in itertools.pairwise(starts))


@settings(deadline=None, max_examples=200)
@given(drawn=INTERVALS)
def test_an_interval_that_fits_in_one_cube_gets_the_one_with_the_nearest_centre(drawn: tuple[int, list[float]]) -> None:
    length, (low, high) = drawn
    starts = axis_starts(length, 128)
    fitting = [start for start in starts if start <= low and high <= start + 128]
    assume(fitting)
    (index,) = axis_cover(low, high, starts, 128)
    distances = {start: abs(start + 64 - (low + high) / 2) for start in fitting}
    assert starts[index] in distances
    assert distances[starts[index]] == min(distances.values())


@settings(deadline=None, max_examples=200)
@given(drawn=INTERVALS)
def test_an_interval_too_long_for_one_cube_gets_hardly_more_cubes_than_needed(drawn: tuple[int, list[float]]) -> None:
    length, (low, high) = drawn
    starts = axis_starts(length, 128)
    fewest, reached = 0, low
    while fewest == 0 or reached < high:  # always the cube that reaches farthest
        reached = max(start for start in starts if start <= reached) + 128
        fewest += 1
    assert fewest <= len(axis_cover(low, high, starts, 128)) <= fewest + 1


def test_a_click_moved_along_a_scan_enters_each_cube_once() -> None:
    lattice = CropLattice(VolumeGrid((600, 200, 100), (0.7, 1.5, 2.0)), 128)
    walked = [tuple(crop_prompts(lattice, Prompts(points=(Point((row, 100, 50)),)))) for row in range(600)]
    met = [unit for unit, _ in itertools.groupby(walked)]
    assert len(met) == len(lattice.starts[0]) == len(set(met))


@settings(deadline=None, max_examples=50)
@given(move=st.tuples(*[st.floats(-22, 22)] * 3))
def test_clicks_within_22_mm_of_a_cubes_centre_use_that_cube(move: tuple[float, float, float]) -> None:
    lattice = CropLattice(VolumeGrid((400, 500, 200), (1.0, 0.8, 2.0)), 128)
    unit = len(lattice) // 2
    middle = [(start + 64) / scale - 0.5 for start, scale in zip(lattice.origin(unit), lattice.scale, strict=True)]
    h, w, d = (at + mm / side for at, mm, side in zip(middle, move, lattice.grid.spacing_mm, strict=True))
    assert tuple(crop_prompts(lattice, Prompts(points=(Point((h, w, d)),)))) == (unit,)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), grid=grids())
def test_every_foreground_voxel_of_a_mask_is_in_a_cube(data: Any, grid: VolumeGrid) -> None:
    lattice = CropLattice(grid, SIDE)
    mask = torch.zeros(grid.shape)
    for _ in range(data.draw(st.integers(1, 3))):
        mask[data.draw(voxels(grid))] = 1.0
    units = tuple(crop_prompts(lattice, Prompts(mask=mask)))
    assert units == tuple(sorted(set(units)))
    held = torch.zeros(grid.shape, dtype=torch.bool)
    for unit in units:
        held[lattice.window(unit)] = True
        assert bool((mask[lattice.window(unit)] > 0.5).any())  # and no cube is superfluous
    assert bool(held[mask > 0.5].all())


def test_a_mask_of_the_whole_scan_is_covered_whole() -> None:
    lattice = _lattice(70, 40, 20)
    answer = lattice.restore(
        {u: torch.ones((SIDE,) * 3) for u in crop_prompts(lattice, Prompts(mask=torch.ones(70, 40, 20)))}
    )
    assert bool((answer == 1).all())


def test_cubes_depend_on_grid_and_prompts_alone() -> None:
    grid = VolumeGrid((90, 80, 30), (0.9, 1.1, 2.5))
    points = (Point((5, 6, 7)), Point((80, 70, 20)), Point((40, 3, 2), positive=False))
    first = crop_prompts(CropLattice(grid, SIDE), Prompts(points=points))
    assert crop_prompts(CropLattice(grid, SIDE), Prompts(points=points)) == first
    assert tuple(crop_prompts(CropLattice(grid, SIDE), Prompts(points=points[::-1]))) == tuple(first)
    assert len(first) > 1


def test_empty_cubes_between_clicks_are_left_out() -> None:
    lattice = _lattice(120, 32, 32)
    found = crop_prompts(lattice, Prompts(points=(Point((2, 16, 16)), Point((117, 16, 16)))))
    assert [lattice.origin(unit)[0] for unit in found] == [0, 88]
    assert [clicks.positions for clicks in found.values()] == [((2, 16, 16),), ((29, 16, 16),)]


def test_a_negative_click_nearby_is_in_the_same_cube() -> None:
    lattice = _lattice(96, 32, 32)
    alone = crop_prompts(lattice, Prompts(points=(Point((40, 16, 16)),)))
    assert [lattice.origin(unit)[0] for unit in alone] == [24]
    ((unit, clicks),) = crop_prompts(
        lattice, Prompts(points=(Point((40, 16, 16)), Point((62, 16, 16), positive=False)))
    ).items()
    assert lattice.origin(unit)[0] == 32
    assert clicks.positions == ((8, 16, 16), (30, 16, 16))
    assert clicks.positive == (True, False)


def test_a_negative_click_far_away_is_left_out_instead_of_adding_a_cube() -> None:
    lattice = _lattice(96, 32, 32)
    alone = crop_prompts(lattice, Prompts(points=(Point((10, 16, 16)),)))
    points = (Point((10, 16, 16)), Point((90, 16, 16), positive=False))
    assert crop_prompts(lattice, Prompts(points=points)) == alone


@pytest.mark.parametrize(
    "prompts",
    [Prompts(), Prompts(points=(Point((5, 5, 5), positive=False),)), Prompts(mask=torch.full((40, 40, 40), 0.5))],
    ids=["nothing", "a negative click", "a mask without foreground"],
)
def test_without_a_positive_prompt_no_cube_is_needed(prompts: Prompts) -> None:
    assert crop_prompts(_lattice(40, 40, 40), prompts) == {}


@pytest.mark.parametrize("position", [(40, 0, 0), (0, -0.6, 0), (0, 0, math.nan)])
def test_a_click_outside_the_scan_is_refused(position: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"lies outside the scan of shape \(40, 40, 40\)"):
        crop_prompts(_lattice(40, 40, 40), Prompts(points=(Point((1, 1, 1)), Point(position, positive=False))))


def test_clicks_at_the_very_borders_are_in_a_cube() -> None:
    lattice = CropLattice(VolumeGrid((37, 50, 11), (1.3, 1.7, 4.9)), SIDE)
    corners = itertools.product(*((-0.5, length - 0.5 - 1e-9) for length in lattice.grid.shape))
    for h, w, d in corners:
        ((_, clicks),) = crop_prompts(lattice, Prompts(points=(Point((h, w, d)),))).items()
        assert all(-0.5 <= at <= SIDE - 0.5 for at in clicks.positions[0])


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the mask has shape \(4, 4, 4\), but the scan has \(40, 40, 40\)"):
        crop_prompts(_lattice(40, 40, 40), Prompts(mask=torch.ones(4, 4, 4)))


@settings(deadline=None, max_examples=12)
@given(axes=AXES, data=st.data(), spacing=st.tuples(*[st.sampled_from([1.0, 1.6, 2.5, 4.0])] * 3))
def test_a_click_on_the_label_maps_to_it_in_the_cube_for_any_orientation_of_the_file(
    axes: tuple[str, str, str], data: Any, spacing: tuple[float, float, float]
) -> None:
    h, w, d = (round(mm / side) for mm, side in zip((52, 64, 76), spacing, strict=True))
    voxel = [data.draw(st.integers(n // 3, n - 1 - n // 3)) for n in (h, w, d)]
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = data.draw(st.tuples(*[st.floats(-90, 90)] * 3))
    at = np.stack(np.meshgrid(*(np.arange(n) for n in (h, w, d)), indexing="ij"), -1)
    label = (np.linalg.norm((at - voxel) * spacing, axis=-1) < 6).astype(np.uint8)  # a ball of 6 mm in RAS
    world = affine[:3, :3] @ np.array(voxel) + affine[:3, 3]
    change = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    turned = nib.orientations.apply_orientation(label, change)
    turned_affine = affine @ inv_ornt_aff(change, label.shape)
    plan = tiny_plan("data.spacing_mm=[1.2, 1.5, 2.8]", "data.intensity={kind: window, lower: 0, upper: 100}")
    with tempfile.TemporaryDirectory() as folder:
        image = write_nifti(Path(folder) / "i.nii.gz", 100 * turned.astype(np.float32), turned_affine)
        case = Case("case", (image,), write_nifti(Path(folder) / "l.nii.gz", turned, turned_affine), Role.LABELED)
        scan = load_scan(case, plan)
    assert scan.label is not None
    r, a, s = scan.label.nonzero().double().mean(0).tolist()
    lattice = CropLattice(VolumeGrid(scan.grid.shape, scan.grid.spacing_mm), SIDE)
    ((unit, clicks),) = crop_prompts(lattice, Prompts(points=(Point((r, a, s)),))).items()
    # The image's ball is there in the cube,
    cube = lattice.cut(lattice.resample(scan.image[0] - scan.image.min()), unit)
    found = [float((torch.arange(SIDE) * _profile(cube, axis)).sum() / cube.sum()) for axis in range(3)]
    assert found == pytest.approx(clicks.positions[0], abs=0.7)
    # and the cube's voxel is where the ball is in world coordinates.
    edges = [start + position + 0.5 for start, position in zip(lattice.origin(unit), clicks.positions[0], strict=True)]
    back = [edge / scale - 0.5 for edge, scale in zip(edges, lattice.scale, strict=True)]
    reached = scan.grid.affine.numpy() @ np.array([*back, 1.0])
    assert np.linalg.norm(reached[:3] - world) < 1.5
