"""What SAM's and MedSAM's encoders see of a slice; prompts and answers are aligned with the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists import Point, Prompts, SliceBox, VolumeGrid, cards
from semisam_core.generalists.sam import Sam
from semisam_core.generalists.slices import intensity_limits
from tests.semisam_core.generalists.tiny_sam import SIDE, loaded, scene, tiny_sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    return loaded(cards.SAM, tiny_sam())


@pytest.fixture(scope="module")
def medsam() -> Sam:
    return loaded(cards.MEDSAM, tiny_sam())


@pytest.mark.parametrize("name", ["sam", "medsam"])
def test_intensities_beyond_the_scans_percentiles_are_clipped(name: str) -> None:
    model = loaded(getattr(cards, name.upper()), tiny_sam())
    spoilt = scene()
    spoilt[0, 0, 2], spoilt[40, 40, 2] = -1e4, 1e4
    clipped = scene()
    clipped[0, 0, 2], clipped[40, 40, 2] = 0, 255
    assert intensity_limits(spoilt) == (0, 255)
    frames = [model.frames(each, [2], intensity_limits(spoilt)) for each in (spoilt, clipped)]
    assert torch.equal(*frames)


def test_sams_image_is_normalised_and_padded_below_and_right_with_zeros(sam: Sam) -> None:
    frames = sam.frames(scene(), [2, 4], (0.0, 255.0))
    assert tuple(frames.shape) == (2, 3, SIDE, SIDE)
    assert not frames[..., 48:].any()
    network = sam.network
    assert torch.allclose(frames[1, :, :, :48], (scene()[:, :, 4] - network.pixel_mean) / network.pixel_std, atol=1e-5)


def test_medsams_image_fills_the_frame_between_0_and_1_in_equal_channels(medsam: Sam) -> None:
    frames = medsam.frames(scene(), [2, 4], intensity_limits(scene()))
    assert tuple(frames.shape) == (2, 3, SIDE, SIDE)
    assert frames.amin(dim=(1, 2, 3)).tolist() == [0, 0]
    assert frames.amax(dim=(1, 2, 3)).tolist() == [1, 1]
    assert torch.equal(frames[:, 0], frames[:, 1])
    assert torch.equal(frames[:, 0], frames[:, 2])
    assert bool((frames[..., 48:] > 0.2).any())


@pytest.mark.parametrize("name", ["sam", "medsam"])
@settings(deadline=None, max_examples=10)
@given(gain=st.floats(0.01, 100), offset=st.floats(-500, 500))
def test_an_image_does_not_depend_on_the_unit_of_intensity(name: str, gain: float, offset: float) -> None:
    model = loaded(getattr(cards, name.upper()), tiny_sam())
    pictures = [model.frames(scan, [2], intensity_limits(scan)) for scan in (scene(), scene() * gain + offset)]
    assert torch.allclose(*pictures, atol=2e-2)


@contextmanager
def _spied(network: Any) -> Iterator[list[dict[str, Any]]]:
    """Record the prompt encoder's inputs, and make the decoder answer with a spot at the first point."""
    calls: list[dict[str, Any]] = []

    def answer(module: Any, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
        (x, y), side = (calls[-1]["points"][0][0, 0] + 0.5) * output[0].shape[-1] / SIDE, output[0].shape[-1]
        centres = torch.arange(side) + 0.5
        spot = 8 - ((centres - x) ** 2 + (centres[:, None] - y) ** 2) / 2
        return spot.expand_as(output[0]), output[1]

    spies = [
        network.prompt_encoder.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
        ),
        network.mask_decoder.register_forward_hook(answer, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for spy in spies:
            spy.remove()


def _middle(there: Tensor) -> tuple[float, float]:
    """Return the middle (x, y) of a mask's bounds (S, S), in pixels of the encoder's input."""
    (top, left), (bottom, right) = there.nonzero().amin(0).tolist(), there.nonzero().amax(0).tolist()
    scale = SIDE / there.shape[0]
    return scale * (left + right + 1) / 2, scale * (top + bottom + 1) / 2


@pytest.mark.parametrize("stretched", [False, True], ids=["in proportion", "stretched"])
@settings(deadline=None, max_examples=25)
@given(height=st.integers(24, 200), proportion=st.floats(0.4, 2.5), data=st.data())
def test_image_point_box_mask_and_answer_meet_at_the_same_voxel(
    stretched: bool, height: int, proportion: float, data: Any
) -> None:
    model = loaded(cards.SAM, tiny_sam())
    if stretched:  # MedSAM's framing with SAM's card, which takes every kind of prompt
        model.framing = loaded(cards.MEDSAM, tiny_sam()).framing
    shape = (height, max(24, round(height * proportion)), 2)
    (row, row_reach), (column, column_reach) = (
        (data.draw(st.integers(side // 8, side - side // 8 - 1)), side // 8) for side in shape[:2]
    )
    box = SliceBox(1, (row - row_reach, column - column_reach, row + row_reach, column + column_reach))
    scan = torch.zeros(shape)
    scan[row - row_reach : row + row_reach + 1, column - column_reach : column + column_reach + 1, 1] = 1.0
    grid = VolumeGrid(shape, (1.0, 1.0, 1.0))
    with _spied(model.network) as calls:
        prompts = Prompts((box,), (Point((row, column, 1)),), scan)
        answer = model.segment(model.embed(scan, grid, [1]), prompts, grid).probability[:, :, 1]
    (call,) = calls  # coordinates lack the half pixel that the prompt encoder adds
    rows, columns = model.framing.size(shape[:2])
    place = ((column + 0.5) * columns / shape[1], (row + 0.5) * rows / shape[0])
    assert (call["points"][0][0, 0] + 0.5).tolist() == pytest.approx(place, abs=1e-3)
    left, top, right, bottom = (call["boxes"][0] + 0.5).tolist()
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(place, abs=1e-3)
    assert (right - left, bottom - top) == pytest.approx(
        ((2 * column_reach + 1) * columns / shape[1], (2 * row_reach + 1) * rows / shape[0]), abs=1e-3
    )
    picture = model.frames(scan, [1], (0.0, 1.0))[0, 0]
    assert _middle(picture > (picture.min() + picture.max()) / 2) == pytest.approx(place, abs=0.75)
    assert _middle(call["masks"][0, 0] > 0) == pytest.approx(place, abs=2.0)  # one of the mask's larger pixels
    peak = divmod(int(answer.argmax()), shape[1])
    assert abs(peak[0] - row) <= 0.5 + shape[0] / rows
    assert abs(peak[1] - column) <= 0.5 + shape[1] / columns
