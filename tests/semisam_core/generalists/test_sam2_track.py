"""Propagating a prompt through slices, compared with the package's predictor, which reads images from disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sam2", reason="needs the extra fedsemisam[sam2]; the Makefile installs it")

from semisam_core.generalists import Point, Prompts, SliceBox, VolumeGrid
from semisam_core.generalists.sam2_video import Sam2
from semisam_core.generalists.slices import intensity_limits
from tests.semisam_core.generalists.tiny_sam2 import SIDE, load_tiny, scene


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Sam2:
    return load_tiny(tmp_path_factory.mktemp("sam2"))


Prompt = Callable[[Any, Any], Any]
FLAT = (SIDE, SIDE, 22)  # slices have the size of frames, so answers need no resizing


def _by_the_package(model: Sam2, monkeypatch: pytest.MonkeyPatch, prompt: Prompt, start: int) -> dict[int, Tensor]:
    """Return slice -> logits (H, W) from the package's predictor on the same frames."""
    import sam2.sam2_video_predictor as package

    scan = scene(FLAT)
    frames = model.frames(scan, range(FLAT[2]), intensity_limits(scan))
    monkeypatch.setattr(package, "load_video_frames", lambda **_: (frames, SIDE, SIDE))
    state = model.network.init_state("no pictures on disk")
    found: dict[int, Tensor] = {}
    for reverse in (False, True):
        model.network.reset_state(state)
        prompt(model.network, state)
        for index, _, logits in model.network.propagate_in_video(state, start, reverse=reverse):
            found[index] = logits[0, 0]
    return found


def _box(box: SliceBox) -> Tensor:
    top, left, bottom, right = box.bounds
    return (torch.tensor([left, top, right + 1, bottom + 1]) - 0.5) / SIDE


def _click(point: Point) -> Tensor:
    return torch.tensor([[point.position[1], point.position[0]]]) / SIDE


SQUARE = SliceBox(2, (10, 12, 30, 45))
CLICK = Point((20, 25, 2))
WRONG = Point((50, 20, 2), positive=False)
MASK = torch.zeros(FLAT)
MASK[12:30, 14:40, 2] = 1


def _give_box(network: Any, state: Any) -> None:
    network.add_new_points_or_box(state, SQUARE.index, 1, box=_box(SQUARE), normalize_coords=False)


def _give_click(network: Any, state: Any) -> None:
    network.add_new_points_or_box(state, 2, 1, _click(CLICK), torch.tensor([1]), normalize_coords=False)


def _give_box_and_click(network: Any, state: Any) -> None:
    network.add_new_points_or_box(
        state, 2, 1, _click(WRONG), torch.tensor([0]), box=_box(SQUARE), normalize_coords=False
    )


def _give_mask(network: Any, state: Any) -> None:
    network.add_new_mask(state, 2, 1, MASK[:, :, 2] > 0.5)


def _give_last_box(network: Any, state: Any) -> None:
    network.add_new_points_or_box(state, 19, 1, box=_box(SQUARE), normalize_coords=False)


def _give_two_boxes(network: Any, state: Any) -> None:
    _give_box(network, state)
    _give_last_box(network, state)


@pytest.mark.parametrize(
    ("prompts", "prompt"),
    [
        (Prompts((SQUARE,)), _give_box),
        (Prompts(points=(CLICK,)), _give_click),
        (Prompts((SQUARE,), (WRONG,)), _give_box_and_click),
        (Prompts(mask=MASK), _give_mask),
        (Prompts((SliceBox(19, SQUARE.bounds),)), _give_last_box),
        (Prompts((SQUARE, SliceBox(19, SQUARE.bounds))), _give_two_boxes),
    ],
    ids=["box", "click", "box and click", "mask", "box near the end", "boxes on two slices"],
)
def test_answers_equal_the_packages_predictor(
    model: Sam2, monkeypatch: pytest.MonkeyPatch, prompts: Prompts, prompt: Prompt
) -> None:
    grid, scan = VolumeGrid(FLAT, (1.0, 1.0, 1.0)), scene(FLAT)
    span = (0, FLAT[2] - 1)
    stored = model.embed(scan, grid, range(FLAT[2]))
    asked = Prompts(prompts.boxes, prompts.points, prompts.mask, span)
    answer = model.segment(stored, asked, grid).probability
    expected = _by_the_package(model, monkeypatch, prompt, start=min(prompts.slices()))
    assert sorted(expected) == list(range(FLAT[2]))
    for index, logits in expected.items():
        assert torch.allclose(answer[:, :, index], torch.sigmoid(logits), atol=1e-3)


def test_the_quality_is_the_iou_that_the_decoder_predicts(model: Sam2) -> None:
    grid, predicted = VolumeGrid(FLAT, (1.0, 1.0, 1.0)), list[Tensor]()
    stored = model.embed(scene(FLAT), grid, range(1, 5))
    handle = model.network.sam_mask_decoder.register_forward_hook(
        lambda module, arguments, outputs: predicted.append(outputs[1])
    )
    try:
        answer = model.segment(stored, Prompts((SQUARE,), span=(1, 4)), grid)
    finally:
        handle.remove()
    expected = [answer.quality[index] for index in (2, 3, 4, 1)]
    assert [float(each.max()) for each in predicted] == pytest.approx(expected)
