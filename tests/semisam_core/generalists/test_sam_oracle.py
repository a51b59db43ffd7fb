"""SAM and MedSAM against their published code: segment_anything's predictor and MedSAM's inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch import Tensor
from torchvision.transforms.functional import resize

from semisam_core.generalists import Point, Prompts, SliceBox, VolumeGrid, cards
from semisam_core.generalists.sam import Sam
from tests.semisam_core.generalists.tiny_sam import GRID, SHAPE, SIDE, VOXELS, loaded, scene, tiny_sam

BOX = SliceBox(2, (20, 6, 41, 27))
POINT = Point((30, 15, 2))


@pytest.fixture(scope="module")
def sam() -> Sam:
    return loaded(cards.SAM, tiny_sam())


@pytest.fixture(scope="module")
def embeddings(sam: Sam) -> dict[int, Tensor]:
    return sam.embed(scene(), VOXELS, range(SHAPE[2]))


def _official(
    index: int,
    shape: tuple[int, int, int],
    points: Sequence[Point] = (),
    box: SliceBox | None = None,
    mask: Tensor | None = None,
    multimask: bool = False,
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run segment_anything's predictor, whose pixel centres are whole numbers and which adds half a pixel itself."""
    predictor = SamPredictor(tiny_sam(seed))
    picture = scene(shape)[:, :, index].numpy().astype(np.uint8)
    predictor.set_image(np.repeat(picture[:, :, None], 3, axis=2))
    rows, columns = (size / full for size, full in zip(predictor.input_size, shape, strict=False))

    def centre(row: float, column: float) -> list[float]:
        return [(column + 0.5) * columns - 0.5, (row + 0.5) * rows - 0.5]

    clicks = torch.tensor([[centre(*point.position[:2]) for point in points]])
    labels = torch.tensor([[int(point.positive) for point in points]])
    bounds = None if box is None else box.bounds
    corners = bounds and [*centre(bounds[0] - 0.5, bounds[1] - 0.5), *centre(bounds[2] + 0.5, bounds[3] + 0.5)]
    logits, overlap, _ = predictor.predict_torch(
        clicks if points else None,
        labels if points else None,
        torch.tensor([corners]) if corners else None,
        mask,
        multimask_output=multimask,
        return_logits=True,
    )
    return torch.sigmoid(logits[0]), overlap[0]


@pytest.mark.parametrize("shape", [SHAPE, (40, 56, 5), (120, 90, 5), (16, 64, 5)], ids=str)
@pytest.mark.parametrize(
    "prompts",
    [
        Prompts((SliceBox(2, (3, 6, 11, 27)),)),
        Prompts(points=(Point((9, 15, 2)), Point((14, 40, 2), positive=False), Point((5, 16, 2)))),
        Prompts((SliceBox(2, (3, 6, 11, 27)),), (Point((9, 15, 2)), Point((14, 40, 2), positive=False))),
    ],
    ids=["box", "points", "box and points"],
)
def test_answers_equal_the_published_predictors(sam: Sam, prompts: Prompts, shape: tuple[int, int, int]) -> None:
    grid = VolumeGrid(shape, (1.0, 1.0, 1.0))
    answer = sam.segment(sam.embed(scene(shape), grid, [2]), prompts, grid)
    points = sorted(prompts.points, key=lambda point: point.position)
    expected, overlap = _official(2, shape, points, prompts.boxes[0] if prompts.boxes else None)
    # The predictor rounds resized images to whole intensities.
    assert torch.allclose(answer.probability[:, :, 2], expected[0], atol=1e-5 if shape == SHAPE else 0.02)
    assert answer.quality == {2: pytest.approx(float(overlap.clamp(0, 1)), abs=1e-5 if shape == SHAPE else 0.02)}
    assert float(answer.probability[:, :, 2].std()) > 0.02  # not constant


@pytest.mark.parametrize(
    ("points", "box"), [((), None), ((POINT,), None), ((POINT,), BOX), ((), BOX)], ids=["alone", "point", "all", "box"]
)
def test_an_answer_to_a_mask_equals_the_published_predictors(
    sam: Sam, embeddings: dict[int, Tensor], points: tuple[Point, ...], box: SliceBox | None
) -> None:
    side = 4 * GRID
    coarse = torch.full((side, side * 3 // 4), 0.2)  # one value per pixel of the prompt's frame
    coarse[6:20, 4:15] = 0.9
    mask = torch.zeros(SHAPE)
    mask[:, :, 2] = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1)
    given = sam.network.prompt_encoder.mask_input_size
    assert given == (side, side)
    answer = sam.segment(embeddings, Prompts(() if box is None else (box,), points, mask), VOXELS)
    prompt = torch.nn.functional.interpolate(
        torch.logit(mask[:, :, 2])[None, None], size=coarse.shape, mode="bilinear", antialias=True
    )
    prompt = torch.nn.functional.pad(prompt, (0, side - coarse.shape[1]), value=-10.0)
    expected, overlap = _official(2, SHAPE, points, box, prompt)
    assert torch.allclose(answer.probability[:, :, 2], expected[0], atol=1e-5)
    assert answer.quality == {2: pytest.approx(float(overlap.clamp(0, 1)), abs=1e-5)}


def test_the_highest_rated_of_several_answers_to_one_point_is_used() -> None:
    rated: set[int] = set()
    for seed in range(6):
        sam = loaded(cards.SAM, tiny_sam(seed))
        answer = sam.segment(sam.embed(scene(), VOXELS, [2]), Prompts(points=(POINT,)), VOXELS)
        expected, overlaps = _official(2, SHAPE, [POINT], multimask=True, seed=seed)
        assert len(overlaps) == 3
        best = int(overlaps.argmax())
        rated.add(best)
        assert torch.allclose(answer.probability[:, :, 2], expected[best], atol=1e-5)
        assert answer.quality == {2: pytest.approx(float(overlaps.clamp(0, 1)[best]), abs=1e-5)}
    assert len(rated) > 1  # not the same one of the three for every network


@pytest.mark.parametrize(("seed", "quality"), [(0, 0.0), (4, 1.0)])
def test_a_predicted_iou_beyond_0_or_1_is_clipped(seed: int, quality: float) -> None:
    sam = loaded(cards.SAM, tiny_sam(seed))
    assert sam.segment(sam.embed(scene(), VOXELS, [2]), Prompts((BOX,)), VOXELS).quality == {2: quality}
    _, predicted = _official(2, SHAPE, box=BOX, seed=seed)
    assert not 0 <= float(predicted) <= 1


def test_medsams_answer_equals_its_published_inference() -> None:
    medsam = loaded(cards.MEDSAM, tiny_sam())
    shape = (40, 90, 3)
    grid = VolumeGrid(shape, (1.0, 1.0, 1.0))
    box = SliceBox(1, (8, 20, 30, 70))
    answer = medsam.segment(medsam.embed(scene(shape), grid, [1]), Prompts((box,)), grid)
    network = medsam.network
    picture = resize(scene(shape)[None, :, :, 1], [SIDE, SIDE], antialias=True)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    edges = torch.tensor([[20 / 90, 8 / 40, 71 / 90, 31 / 40]]) * SIDE
    sparse, dense = network.prompt_encoder(points=None, boxes=edges - 0.5, masks=None)
    with torch.no_grad():
        logits, _ = network.mask_decoder(
            image_embeddings=network.image_encoder(picture.expand(1, 3, -1, -1)),
            image_pe=network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    expected = torch.sigmoid(network.postprocess_masks(logits, (SIDE, SIDE), shape[:2]))[0, 0]
    assert torch.allclose(answer.probability[:, :, 1], expected, atol=1e-4)
