"""A tiny SAM 2 and MedSAM2: how slices become frames, and how prompts are propagated and answered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("sam2", reason="needs the extra fedsemisam[sam2]; the Makefile installs it")

from semisam_core.evaluation import dice_of
from semisam_core.generalists import (
    EmbeddingStore,
    Point,
    Prompts,
    Segmentation,
    SliceBox,
    VolumeGrid,
    scan_key,
)
from semisam_core.generalists.cards import MEDSAM2, SAM2
from semisam_core.generalists.sam2_video import Sam2
from semisam_core.generalists.slices import intensity_limits
from tests.semisam_core.generalists.tiny_sam2 import SIDE, load_tiny, scene, set_presence, tiny_sam2, write_config

CPU = torch.device("cpu")
SHAPE = (96, 40, 24)  # taller than wide, so that swapped axes show
GRID = VolumeGrid(SHAPE, (1.0, 1.0, 1.0))
SPAN = (2, 21)  # longer than the memory
UPPER = SliceBox(5, (18, 8, 46, 30))
LOWER = SliceBox(5, (60, 4, 88, 20))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Sam2:
    return load_tiny(tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def embeddings(model: Sam2) -> dict[int, Tensor]:
    return model.embed(scene(SHAPE), GRID, range(SHAPE[2]))


@pytest.fixture(scope="module")
def carried(model: Sam2, embeddings: dict[int, Tensor]) -> Segmentation:
    """Return the answer to one box propagated through the span."""
    return model.segment(embeddings, Prompts((UPPER,), span=SPAN), GRID)


def _answered(answer: Segmentation) -> list[int]:
    return [index for index in range(SHAPE[2]) if bool(answer.probability[:, :, index].any())]


def test_it_is_frozen(model: Sam2, embeddings: dict[int, Tensor], carried: Segmentation) -> None:
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
    assert not any(each.requires_grad for each in (*embeddings.values(), carried.probability))


# Units and embeddings


def test_without_a_span_each_prompted_slice_is_one_unit(model: Sam2) -> None:
    mask = torch.zeros(SHAPE)
    mask[3, 3, 7] = 1
    prompts = Prompts((SliceBox(4, (0, 0, 5, 5)), SliceBox(1, (0, 0, 5, 5))), (Point((3, 3, 9)),), mask)
    assert model.units(prompts, GRID) == (1, 4, 7, 9)


def test_with_a_span_all_its_slices_are_units(model: Sam2) -> None:
    assert model.units(Prompts((UPPER,), span=(7, 10)), GRID) == (5, 7, 8, 9, 10)


def test_without_prompts_no_unit_is_needed_and_the_answer_is_empty(model: Sam2) -> None:
    negative = Point((3, 3, 9), positive=False)
    for prompts in (Prompts(), Prompts(span=SPAN), Prompts(points=(negative,), span=SPAN)):
        assert model.units(prompts, GRID) == ()
        answer = model.segment({}, prompts, GRID)
        assert not answer.probability.any()
        assert answer.quality == {}


def test_an_embedding_is_a_vector_with_four_numbers_per_pixel_of_the_frame(embeddings: dict[int, Tensor]) -> None:
    for each in embeddings.values():
        assert (tuple(each.shape), each.dtype, each.is_contiguous()) == ((4 * SIDE**2,), torch.float32, True)
        assert not each.is_inference()
        assert bool(torch.isfinite(each).all())


def test_batches_give_the_same_embeddings_as_one_slice_at_a_time(model: Sam2, embeddings: dict[int, Tensor]) -> None:
    batched = Sam2(SAM2, model.network, model.weights_sha256, CPU, batch_size=3)
    together = batched.embed(scene(SHAPE), GRID, range(7))
    assert all(torch.allclose(together[index], embeddings[index], atol=1e-3) for index in range(7))


def test_an_answer_does_not_depend_on_whether_embeddings_were_stored_before(
    model: Sam2, embeddings: dict[int, Tensor], tmp_path: Path
) -> None:
    """How near it is to the answer of embeddings as they are made cannot be told by random weights."""
    store, scan, prompts = EmbeddingStore(tmp_path, 10_000_000), scene(SHAPE), Prompts((UPPER,), span=SPAN)
    made, read = (store.fetch(model, scan_key(scan), scan, GRID, model.units(prompts, GRID)) for _ in range(2))
    assert store.hits == len(read)
    for index, found in read.items():
        assert torch.equal(found, made[index])
        assert float((found - embeddings[index]).norm() / embeddings[index].norm()) < 0.1
    first, second = model.segment(made, prompts, GRID), model.segment(read, prompts, GRID)
    assert bool((first.probability > 0.5).any())
    assert torch.allclose(first.probability, second.probability, atol=1e-5)
    assert first.quality == pytest.approx(second.quality, abs=1e-5)


@pytest.mark.parametrize(
    ("volume", "units", "says"),
    [
        (torch.zeros(8, 8), [0], r"shape \(H, W, D\)"),
        (torch.zeros(8, 8, 3), [0, 3, -1], r"slices \[3, -1\] are outside the scan, which has slices 0 to 2"),
        (torch.full((8, 8, 3), math.nan), [0], "not finite"),
    ],
)
def test_scans_and_slices_that_cannot_be_encoded_are_refused(
    model: Sam2, volume: Tensor, units: list[int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        model.embed(volume, GRID, units)


# Frames


def test_frames_are_square_and_normalised_like_sam_2s_training_images(model: Sam2) -> None:
    scan = torch.zeros(SHAPE)
    scan[:, SHAPE[1] // 2 :] = 10
    frames = model.frames(scan, [1, 4], (0.0, 10.0))
    assert tuple(frames.shape) == (2, 3, SIDE, SIDE)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        values = frames[:, channel] * std + mean
        assert torch.allclose(values[..., : SIDE // 2 - 2], torch.tensor(0.0), atol=1e-6)
        assert torch.allclose(values[..., SIDE // 2 + 2 :], torch.tensor(1.0), atol=1e-6)


def test_a_slice_darker_than_the_others_stays_darker(model: Sam2) -> None:
    scan = scene(SHAPE)
    scan[:, :, 3] = 0.5 * scan[:, :, 3]
    frames = model.frames(scan, [2, 3], intensity_limits(scan))
    assert float(frames[1].mean()) < float(frames[0].mean()) - 0.5


def test_a_slice_is_stretched_to_the_frame(model: Sam2) -> None:
    scan = scene(SHAPE)
    low, high = intensity_limits(scan)
    scaled = ((scan[:, :, 4].clamp(low, high) - low) / (high - low))[None, None]
    expected = F.interpolate(scaled, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    frame = model.frames(scan, [4], (low, high))
    assert torch.allclose(frame[:, :1] * 0.229 + 0.485, expected, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(gain=st.floats(0.01, 100), offset=st.floats(-500, 500))
def test_frames_do_not_depend_on_the_unit_of_intensity(model: Sam2, gain: float, offset: float) -> None:
    scan = scene(SHAPE)
    changed = scan * gain + offset
    frames, again = (model.frames(each, [2], intensity_limits(each)) for each in (scan, changed))
    assert torch.allclose(frames, again, atol=1e-2)


def test_a_constant_scan_becomes_black(model: Sam2) -> None:
    frames = model.frames(torch.full(SHAPE, 7.0), [1], (7.0, 7.0))
    assert torch.equal(frames, model.frames(torch.zeros(SHAPE), [1], (0.0, 1.0)))


# Answers


def test_the_answer_is_a_probability_and_zero_on_unprompted_slices(model: Sam2, embeddings: dict[int, Tensor]) -> None:
    answer = model.segment(embeddings, Prompts((UPPER, SliceBox(9, LOWER.bounds))), GRID)
    assert (tuple(answer.probability.shape), answer.probability.dtype) == (SHAPE, torch.float32)
    assert bool(((answer.probability >= 0) & (answer.probability <= 1)).all())
    assert _answered(answer) == list(answer.quality) == [5, 9]


def test_probabilities_are_not_binarised(carried: Segmentation) -> None:
    between = (carried.probability > 0.05) & (carried.probability < 0.95)
    assert float(between[:, :, SPAN[0] : SPAN[1] + 1].float().mean()) > 0.005  # of a binary mask: none


def test_exactly_the_slices_of_the_span_are_answered(carried: Segmentation) -> None:
    assert _answered(carried) == list(carried.quality) == list(range(SPAN[0], SPAN[1] + 1))
    assert all(0 <= quality <= 1 for quality in carried.quality.values())


def test_another_box_on_the_prompted_slice_changes_the_other_slices(
    model: Sam2, embeddings: dict[int, Tensor], carried: Segmentation
) -> None:
    other = model.segment(embeddings, Prompts((LOWER,), span=SPAN), GRID)
    changes = (other.probability - carried.probability).abs().amax((0, 1))
    assert bool((changes[SPAN[0] : SPAN[1] + 1] > 1e-3).all())


def test_a_prompted_slice_is_answered_independently_of_the_others(
    model: Sam2, embeddings: dict[int, Tensor], carried: Segmentation
) -> None:
    alone = model.segment({5: embeddings[5]}, Prompts((UPPER,)), GRID)
    assert torch.equal(alone.probability[:, :, 5], carried.probability[:, :, 5])
    assert alone.quality[5] == carried.quality[5]


def test_both_directions_start_from_the_prompted_slice_alone(
    model: Sam2, embeddings: dict[int, Tensor], carried: Segmentation
) -> None:
    only_below = {index: embeddings[index] for index in range(SPAN[0], 6)}
    # A video of the same length whose slices above the prompted one differ.
    changed = embeddings | {index: embeddings[index].flip(0) for index in range(6, SPAN[1] + 1)}
    answer = model.segment(changed | only_below, Prompts((UPPER,), span=SPAN), GRID)
    assert torch.equal(answer.probability[:, :, :6], carried.probability[:, :, :6])
    assert not torch.allclose(answer.probability[:, :, 6], carried.probability[:, :, 6], atol=1e-3)


def test_a_prompted_slice_outside_the_span_is_remembered_but_not_answered(
    model: Sam2, embeddings: dict[int, Tensor]
) -> None:
    near, other = (model.segment(embeddings, Prompts((box,), span=(8, 11)), GRID) for box in (UPPER, LOWER))
    assert _answered(near) == list(near.quality) == [8, 9, 10, 11]
    assert float((near.probability - other.probability)[:, :, 8:12].abs().max()) > 1e-3


def test_calling_twice_gives_equal_answers(model: Sam2, embeddings: dict[int, Tensor], carried: Segmentation) -> None:
    again = model.segment(embeddings, Prompts((UPPER,), span=SPAN), GRID)
    assert torch.equal(again.probability, carried.probability)
    assert again.quality == carried.quality


def test_the_order_of_scans_changes_nothing(model: Sam2, carried: Segmentation) -> None:
    answers = []
    for seed in (1, 0, 1):
        stored = model.embed(scene(SHAPE, seed), GRID, range(SHAPE[2]))
        answers.append(model.segment(stored, Prompts((UPPER,), span=SPAN), GRID).probability)
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], carried.probability)
    assert not torch.equal(answers[0], answers[1])


def test_the_order_of_prompts_changes_nothing(model: Sam2, embeddings: dict[int, Tensor]) -> None:
    boxes = (UPPER, SliceBox(12, LOWER.bounds), SliceBox(9, UPPER.bounds))
    points = (Point((30, 20, 9)), Point((70, 10, 12), positive=False))
    one = model.segment(embeddings, Prompts(boxes, points, span=SPAN), GRID)
    other = model.segment(embeddings, Prompts(boxes[::-1], points[::-1], span=SPAN), GRID)
    assert torch.equal(one.probability, other.probability)


def test_a_slice_takes_the_highest_probability_of_its_boxes(model: Sam2, embeddings: dict[int, Tensor]) -> None:
    for span in (None, (3, 8)):
        one, other = (model.segment(embeddings, Prompts((box,), span=span), GRID) for box in (UPPER, LOWER))
        both = model.segment(embeddings, Prompts((UPPER, LOWER), span=span), GRID)
        assert torch.equal(both.probability, torch.maximum(one.probability, other.probability))
        assert both.quality == {
            index: pytest.approx((one.quality[index] + other.quality[index]) / 2) for index in one.quality
        }


def test_a_second_prompted_slice_affects_propagation(
    model: Sam2, embeddings: dict[int, Tensor], carried: Segmentation
) -> None:
    answer = model.segment(embeddings, Prompts((UPPER, SliceBox(12, LOWER.bounds)), span=SPAN), GRID)
    alone = model.segment(embeddings, Prompts((SliceBox(12, LOWER.bounds),)), GRID)
    assert torch.equal(answer.probability[:, :, 12], alone.probability[:, :, 12])
    for index in (SPAN[0], 8, SPAN[1]):
        assert not torch.allclose(answer.probability[:, :, index], carried.probability[:, :, index], atol=1e-4)


def test_a_click_with_a_box_and_a_click_with_a_mask_change_the_answer(
    model: Sam2, embeddings: dict[int, Tensor]
) -> None:
    click, mask = Point((30, 20, 5)), torch.zeros(SHAPE)
    mask[18:46, 8:30, 5] = 0.9
    sets = [
        Prompts((UPPER,)),
        Prompts((UPPER,), (click,)),
        Prompts(points=(click,)),
        Prompts(points=(click,), mask=mask),
        Prompts(mask=mask),
    ]
    answers = [model.segment(embeddings, prompts, GRID).probability for prompts in sets]
    for position, answer in enumerate(answers):
        assert all(not torch.allclose(answer, other, atol=1e-3) for other in answers[:position])


def test_a_mask_alone_is_the_answer_if_propagated_and_an_initial_guess_otherwise(
    model: Sam2, embeddings: dict[int, Tensor]
) -> None:
    mask = torch.zeros(SHAPE)
    mask[18:46, 8:30, 5] = 0.9
    carried = model.segment(embeddings, Prompts(mask=mask, span=(4, 8)), GRID)
    alone = model.segment(embeddings, Prompts(mask=mask), GRID)
    assert dice_of(carried.probability[:, :, 5] > 0.5, mask[:, :, 5] > 0.5) > 0.95
    assert carried.quality[5] == pytest.approx(1)
    assert dice_of(alone.probability[:, :, 5] > 0.5, mask[:, :, 5] > 0.5) < 0.9
    assert alone.quality[5] < 1


def test_without_a_visible_target_the_answer_is_empty_and_the_quality_is_its_certainty(
    tmp_path: Path, embeddings: dict[int, Tensor]
) -> None:
    network = tiny_sam2(write_config(tmp_path / "tiny.yaml"))
    set_presence(network, -2.0)
    answer = Sam2(SAM2, network, "0" * 64, CPU, 1).segment(embeddings, Prompts((UPPER,), span=(4, 7)), GRID)
    assert not answer.probability.any()
    assert answer.quality == {index: pytest.approx(1 / (1 + math.exp(-2))) for index in range(4, 8)}


def test_nothing_is_printed(model: Sam2, embeddings: dict[int, Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    model.segment(embeddings, Prompts((UPPER,), span=(4, 7)), GRID)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (Prompts((SliceBox(3, (0, 0, 5, 5)),), span=(2, 4)), r"no embedding for the slices \[2, 3, 4\]"),
        (Prompts((UPPER,), span=(4, 24)), r"the span \(4, 24\) is not within this scan, which has slices 0 to 23"),
        (Prompts((UPPER,), span=(6, 4)), r"the span \(6, 4\)"),
        (Prompts((SliceBox(24, (0, 0, 5, 5)),)), "slice 24; this scan has slices 0 to 23"),
        (Prompts(points=(Point((3, 3, 4.5)),)), "whole slice"),
        (Prompts(mask=torch.zeros(3, 3, 3)), "the scan's shape"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(model: Sam2, prompts: Prompts, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.segment({}, prompts, GRID)


def test_prompts_that_medsam2_was_not_trained_for_are_refused(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, MEDSAM2)
    with pytest.raises(ValueError, match=r"medsam2 takes no prompts of kind points-2d; accepted: box-2d, propagated"):
        model.units(Prompts(points=(Point((3, 3, 3)),)), GRID)


# Geometry


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_prompts_reach_the_encoder_at_their_place_on_the_stretched_slice(model: Sam2, data: st.DataObject) -> None:
    height, width = data.draw(st.tuples(st.integers(8, 120), st.integers(8, 120)))
    top, bottom = sorted(data.draw(st.tuples(st.floats(0, height - 1), st.floats(0, height - 1))))
    left, right = sorted(data.draw(st.tuples(st.floats(0, width - 1), st.floats(0, width - 1))))
    row, column = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    prompts = Prompts((SliceBox(1, (top, left, bottom, right)),), (Point((row, column, 1)),))
    handed, labels = _encoder_inputs(model, prompts, VolumeGrid((height, width, 3), (1.0, 1.0, 1.0)))
    scale = torch.tensor([SIDE / width, SIDE / height])
    expected = torch.tensor([[left, top], [right + 1, bottom + 1], [column + 0.5, row + 0.5]]) * scale
    assert torch.allclose(handed, expected, atol=1e-3)
    assert labels.tolist() == [2, 3, 1]


def _encoder_inputs(model: Sam2, prompts: Prompts, grid: VolumeGrid) -> tuple[Tensor, Tensor]:
    """Return the coordinates that SAM 2's prompt encoder gets, plus the half pixel that it adds, and the labels."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        seen.append(named["points"])

    handle = model.network.sam_prompt_encoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.segment({1: torch.zeros(4 * SIDE**2)}, prompts, grid)
    finally:
        handle.remove()
    ((coordinates, labels),) = seen
    return coordinates[0] + 0.5, labels[0]


@settings(deadline=None, max_examples=10)
@given(height=st.integers(24, 90), width=st.integers(24, 90), data=st.data())
def test_answers_map_back_to_their_voxels(model: Sam2, height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.tuples(st.integers(0, height - 12), st.integers(0, width - 12)))
    mask = torch.zeros(height, width, 2)
    mask[top : top + 12, left : left + 12, 0] = 1
    grid = VolumeGrid((height, width, 2), (1.0, 1.0, 1.0))
    stored = {index: torch.zeros(4 * SIDE**2) for index in (0, 1)}
    answer = model.segment(stored, Prompts(mask=mask, span=(0, 1)), grid).probability[:, :, 0]
    pixel = torch.tensor([height, width]) / (
        SIDE // 4
    )  # voxels per pixel of the answer, which has a quarter of the resolution
    assert bool(((_centre(answer) - _centre(mask[:, :, 0])).abs() < 0.35 * pixel + 0.15).all())


def _centre(weights: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in weights.shape), indexing="ij")
    return torch.stack([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()
