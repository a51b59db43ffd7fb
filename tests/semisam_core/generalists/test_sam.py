"""SAM and MedSAM with tiny random weights: loading, prompts and answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semisam_core.errors import WeightsError
from semisam_core.generalists import Point, PromptKind, Prompts, SliceBox, cards, load_generalist
from semisam_core.generalists.base import GeneralistCard
from semisam_core.generalists.sam import Sam, load
from semisam_core.generalists.slices import FeatureMaps
from tests.semisam_core.generalists.tiny_sam import GRID, PROMPT_WIDTH, SHAPE, VOXELS, loaded, save, scene, tiny_sam

CPU = torch.device("cpu")
BOX = SliceBox(2, (20, 6, 41, 27))
OTHER_BOX = SliceBox(2, (5, 30, 18, 45))
POINT = Point((30, 15, 2))
both = pytest.mark.parametrize("card", [cards.SAM, cards.MEDSAM], ids=["sam", "medsam"])


@pytest.fixture(scope="module")
def sam() -> Sam:
    return loaded(cards.SAM, tiny_sam())


@pytest.fixture(scope="module")
def medsam() -> Sam:
    return loaded(cards.MEDSAM, tiny_sam())


@pytest.fixture(scope="module")
def embeddings(sam: Sam) -> dict[int, Tensor]:
    return sam.embed(scene(), VOXELS, range(SHAPE[2]))


def _mask() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


@both
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_loading_restores_the_saved_model(card: GeneralistCard, wrapper: str | None, tmp_path: Path) -> None:
    state = tiny_sam().state_dict()
    sha256 = save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "tiny.pth")
    model = load_generalist(card.name, CPU, tmp_path / "tiny.pth", sha256)
    assert isinstance(model, Sam)
    assert (model.card, model.weights_sha256) == (card, sha256)
    original = loaded(card, tiny_sam())
    embedded, expected = (each.embed(scene(), VOXELS, [2]) for each in (model, original))
    assert torch.equal(embedded[2], expected[2])
    prompts = Prompts((BOX,))
    answers = [each.segment(embedded, prompts, VOXELS) for each in (model, original)]
    assert torch.equal(answers[0].probability, answers[1].probability)
    assert answers[0].quality == answers[1].quality


def test_weights_of_another_hash_are_refused(tmp_path: Path) -> None:
    save(tiny_sam().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(WeightsError, match=rf"tiny.pth: .* expected {'0' * 64}; accepted is sam_vit_b_01ec64.pth"):
        load(cards.SAM, CPU, tmp_path / "tiny.pth", "0" * 64)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth: .* do not fit SAM.* accepted is medsam_vit_b"):
        load(cards.MEDSAM, CPU, tmp_path / "other.pth", None)


@both
def test_without_a_weights_file_the_error_names_the_published_one(card: GeneralistCard) -> None:
    for attempt in (lambda: load_generalist(card.name, CPU), lambda: load(card, CPU, None, None)):
        with pytest.raises(WeightsError, match=r"vit_b\w*\.pth \(SHA-256 [0-9a-f]{64}\)"):
            attempt()


def test_loading_does_not_change_the_random_state(tmp_path: Path) -> None:
    save(tiny_sam().state_dict(), tmp_path / "tiny.pth")
    before = torch.get_rng_state()
    load(cards.SAM, CPU, tmp_path / "tiny.pth", None)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_frozen(tmp_path: Path) -> None:
    save(tiny_sam().train().state_dict(), tmp_path / "tiny.pth")
    model = load(cards.SAM, CPU, tmp_path / "tiny.pth", None)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
    embedded = model.embed(scene(), VOXELS, range(SHAPE[2]))
    answer = model.segment(embedded, Prompts((BOX,), (POINT,), _mask()), VOXELS)
    assert not any(each.requires_grad for each in (*embedded.values(), answer.probability))


def test_the_card_of_another_model_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="no preprocessing is known for lite-medsam; accepted are sam, medsam"):
        loaded(cards.LITE_MEDSAM, tiny_sam())
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        loaded(cards.SAM, tiny_sam(), batch_size=0)


def test_sam_takes_points_boxes_and_masks_and_medsam_only_boxes() -> None:
    assert cards.SAM.prompt_kinds == {PromptKind.POINTS_2D, PromptKind.BOX_2D, PromptKind.MASK_2D}
    assert cards.MEDSAM.prompt_kinds == {PromptKind.BOX_2D}


@pytest.mark.parametrize(
    ("name", "prompts", "says"),
    [
        ("medsam", Prompts((BOX,), (POINT,)), "medsam takes no prompts of kind points-2d; accepted: box-2d"),
        ("medsam", Prompts((BOX,), (), _mask()), "no prompts of kind mask-2d"),
        ("medsam", Prompts(points=(POINT,), mask=_mask()), "no prompts of kind points-2d, mask-2d"),
        ("sam", Prompts((BOX,), span=(0, 3)), "propagated; accepted: box-2d, mask-2d, points-2d"),
        ("sam", Prompts(points=(Point((1, 1, 2.5)),)), "whole slice"),
    ],
)
def test_a_kind_of_prompt_that_the_card_does_not_declare_is_refused(
    name: str, prompts: Prompts, says: str, request: pytest.FixtureRequest, embeddings: dict[int, Tensor]
) -> None:
    model = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=says):
        model.units(prompts, VOXELS)
    with pytest.raises(ValueError, match=says):
        model.segment(embeddings, prompts, VOXELS)


def test_an_embedding_is_an_ordinary_tensor_of_the_networks_size(embeddings: dict[int, Tensor]) -> None:
    assert tuple(embeddings) == tuple(range(SHAPE[2]))
    for each in embeddings.values():
        assert (tuple(each.shape), each.dtype) == ((PROMPT_WIDTH, GRID, GRID), torch.float32)
        assert each.is_contiguous()
        assert not each.is_inference()


def test_each_answered_slice_is_one_unit(sam: Sam) -> None:
    mask = torch.zeros(SHAPE)
    mask[3, 3, 0] = 1
    prompts = Prompts((BOX, OTHER_BOX), (Point((1, 1, 4)), Point((1, 1, 3), positive=False)), mask)
    assert sam.units(prompts, VOXELS) == (0, 2, 4)
    assert sam.units(Prompts(), VOXELS) == ()


def test_the_answer_is_a_probability_of_the_scans_shape_and_zero_on_unprompted_slices(
    sam: Sam, embeddings: dict[int, Tensor]
) -> None:
    points = (Point((1, 1, 4)), Point((1, 1, 3), positive=False))
    answer = sam.segment(embeddings, Prompts((BOX,), points), VOXELS)
    assert (tuple(answer.probability.shape), answer.probability.dtype) == (SHAPE, torch.float32)
    assert bool(((answer.probability >= 0) & (answer.probability <= 1)).all())
    assert [index for index in range(SHAPE[2]) if bool(answer.probability[:, :, index].any())] == [2, 4]
    assert tuple(answer.quality) == (2, 4)
    assert all(0 <= quality <= 1 for quality in answer.quality.values())


def test_without_prompts_the_answer_is_empty(sam: Sam) -> None:
    answer = sam.segment({}, Prompts(), VOXELS)
    assert not answer.probability.any()
    assert answer.quality == {}


@pytest.mark.parametrize("name", ["sam", "medsam"])
def test_a_slice_takes_the_highest_probability_of_its_boxes(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    embedded = model.embed(scene(), VOXELS, [2])
    one, other = (model.segment(embedded, Prompts((box,)), VOXELS) for box in (BOX, OTHER_BOX))
    joined = model.segment(embedded, Prompts((BOX, OTHER_BOX)), VOXELS)
    assert not torch.equal(one.probability, other.probability)
    assert torch.equal(joined.probability, torch.maximum(one.probability, other.probability))
    assert joined.quality[2] == pytest.approx((one.quality[2] + other.quality[2]) / 2)


def _many() -> Prompts:
    """Return prompts of many structures, several of each, on all slices."""
    boxes = [SliceBox(index, (4.0 * index, 5, 30, 20)) for index in (0, 1, 3)]
    points = [Point((7.0 * number % 64, 11.0 * number % 48, number % 5), number % 4 != 1) for number in range(13)]
    return Prompts((*boxes, BOX, OTHER_BOX), tuple(points))


@pytest.mark.parametrize("mask", [None, _mask()], ids=["no mask", "mask"])
def test_batches_give_the_same_answers_as_one_prompt_at_a_time(
    sam: Sam, embeddings: dict[int, Tensor], mask: Tensor | None
) -> None:
    batched = loaded(cards.SAM, sam.network, batch_size=4)
    together = batched.embed(scene(), VOXELS, range(SHAPE[2]))
    assert all(torch.allclose(together[index], embeddings[index], atol=1e-5) for index in embeddings)
    sets = [Prompts(_many().boxes, _many().points, mask), Prompts(_many().boxes, (), mask)]
    sets += [Prompts((), tuple(Point((5.0 * index, 20, index)) for index in range(5)), mask), Prompts(mask=mask)]
    for prompts in sets:
        one, many = (model.segment(embeddings, prompts, VOXELS) for model in (sam, batched))
        assert torch.allclose(one.probability, many.probability, atol=1e-5)
        assert one.quality == pytest.approx(many.quality, abs=1e-5)


def test_the_order_of_prompts_and_slices_changes_nothing(sam: Sam, embeddings: dict[int, Tensor]) -> None:
    batched = loaded(cards.SAM, sam.network, batch_size=3)
    forwards, mask = _many(), _mask()
    backwards = Prompts(forwards.boxes[::-1], forwards.points[::-1], mask)
    one = batched.segment(embeddings, Prompts(forwards.boxes, forwards.points, mask), VOXELS)
    other = batched.segment(dict(reversed(embeddings.items())), backwards, VOXELS)
    assert torch.equal(one.probability, other.probability)
    assert one.quality == other.quality
    again = sam.embed(scene(), VOXELS, [4, 0, 2])
    assert all(torch.equal(again[index], embeddings[index]) for index in (0, 2, 4))


def test_the_sign_of_a_click_changes_the_answer(sam: Sam, embeddings: dict[int, Tensor]) -> None:
    click = Point((50, 40, 2))
    one, other = (
        sam.segment(embeddings, Prompts(points=(POINT, Point(click.position, positive))), VOXELS).probability
        for positive in (True, False)
    )
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("volume", "units", "says"),
    [
        (torch.zeros(8, 8), [0], r"shape \(H, W, D\)"),
        (torch.zeros(8, 8, 3), [0, 3, -1], r"slices \[3, -1\] are outside the scan, which has slices 0 to 2"),
        (torch.full((8, 8, 3), math.nan), [0], "not finite"),
    ],
)
def test_scans_and_slices_that_cannot_be_encoded_are_refused(
    sam: Sam, volume: Tensor, units: list[int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        sam.embed(volume, VOXELS, units)


def test_a_prompt_on_a_slice_without_an_embedding_is_refused(sam: Sam, embeddings: dict[int, Tensor]) -> None:
    some = {index: embeddings[index] for index in (0, 2)}
    with pytest.raises(ValueError, match=r"no embedding for the prompted slices \[1, 3\]"):
        sam.segment(some, Prompts((BOX, SliceBox(3, BOX.bounds)), (Point((1, 1, 1)),)), VOXELS)


def test_a_box_outside_the_scan_is_refused_and_one_across_its_border_is_clipped(
    sam: Sam, embeddings: dict[int, Tensor]
) -> None:
    with pytest.raises(ValueError, match="lies outside the 64 x 48 slice"):
        sam.segment(embeddings, Prompts((SliceBox(2, (64, 0, 70, 5)),)), VOXELS)
    beyond, within = SliceBox(2, (-30, -5.5, 50, 300)), SliceBox(2, (0, 0, 50, 47))
    answers = [sam.segment(embeddings, Prompts((box,)), VOXELS).probability for box in (beyond, within)]
    assert torch.equal(*answers)


@both
def test_the_features_of_a_slice_cover_the_whole_frame(card: GeneralistCard) -> None:
    model = loaded(card, tiny_sam())
    assert card.feature_maps
    assert isinstance(model, FeatureMaps)
    embedding = model.embed(torch.rand(SHAPE), GRID, [1])[1]
    features = model.feature_map(embedding)
    assert features.ndim == 3
    assert features.shape[1] == features.shape[2]
    assert model.framing.side % features.shape[1] == 0
