"""A tiny SAM-Med3D in the published layout: how it is built, its prompts, and the geometry of its answers."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.errors import WeightsError
from semisam_core.generalists import (
    EmbeddingStore,
    Point,
    PromptKind,
    Prompts,
    VolumeGrid,
    accepted_prompts,
    cards,
    load_generalist,
)
from semisam_core.generalists.crops import CropLattice
from semisam_core.generalists.sam_med3d import Architecture, SamMed3D, mask_logits, standardised
from semisam_core.sources.feature_head import FeatureReader
from tests.semisam_core.generalists.tiny_sam_med3d import SIDE, Painter, build, decode, encode, save

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
NAMES = ("sam-med3d", "sam-med3d-turbo", "seganypet")
# Voxels of 1.5 mm already: 32 along two axes, which fit in one cube, and 60 along the other (cubes at 0 to 28).
LONG = VolumeGrid((60, 32, 32), (1.5, 1.5, 1.5))
CUBE = VolumeGrid((32, 32, 32), (1.5, 1.5, 1.5))


@pytest.fixture(scope="module")
def network() -> Any:
    return build()


@pytest.fixture(scope="module")
def weights(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(network, tmp_path_factory.mktemp("weights") / "sam_med3d.pth")


@pytest.fixture(scope="module")
def model(weights: Path) -> SamMed3D:
    return SamMed3D.load(cards.SAM_MED3D, CPU, weights)


def _scan(grid: VolumeGrid) -> Tensor:
    """Return a noisy scan in arbitrary units with a border of constant background."""
    noise = 200 + 50 * torch.rand(grid.shape, generator=torch.Generator().manual_seed(1))
    noise[:2] = 40
    return noise


@pytest.fixture(scope="module")
def embeddings(model: SamMed3D) -> dict[int, Tensor]:
    return model.embed(_scan(LONG), LONG, range(5))


@pytest.fixture(scope="module")
def cube(model: SamMed3D) -> dict[int, Tensor]:
    """Return the embedding of a scan of one cube."""
    return model.embed(_scan(CUBE), CUBE, [0])


NOTHING = torch.zeros(8, 8, 8)


def test_it_takes_clicks_and_a_mask_and_reports_the_hash_of_its_weights(model: SamMed3D, weights: Path) -> None:
    assert model.card.prompt_kinds == {PromptKind.POINTS_3D, PromptKind.MASK_3D}
    assert model.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_registered_and_needs_a_weights_file(name: str, weights: Path) -> None:
    assert accepted_prompts(name) == {PromptKind.POINTS_3D, PromptKind.MASK_3D}
    with pytest.raises(WeightsError, match=f"the generalist {name} has no packaged weights"):
        load_generalist(name, CPU)
    loaded = load_generalist(name, CPU, weights)
    assert loaded.card.name == name
    assert load_generalist(name, CPU, weights) is loaded


def test_its_card_lists_an_atrial_benchmark_that_it_may_have_seen() -> None:
    for card in (cards.SAM_MED3D, cards.SAM_MED3D_TURBO):
        assert any("Left Atrium 2018" in each for each in card.overlaps)


def test_all_tensors_of_the_file_are_loaded(model: SamMed3D, network: Any) -> None:
    state, loaded = network.state_dict(), model.network.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


def test_the_published_sizes_are_inferred_from_the_published_tensors() -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.zeros(1).expand(shape)

    state = {
        "image_encoder.pos_embed": tensor(1, 8, 8, 8, 768),
        "image_encoder.patch_embed.proj.weight": tensor(768, 1, 16, 16, 16),
        "image_encoder.neck.0.weight": tensor(384, 768, 1, 1, 1),
    }
    for block in range(12):
        rows = 15 if block in (2, 5, 8, 11) else 27
        state[f"image_encoder.blocks.{block}.attn.rel_pos_d"] = tensor(rows, 64)
    assert Architecture.of(state, Path("x"), "y") == Architecture(768, 12, 12, (2, 5, 8, 11), 384, 128, 16)


def test_other_sizes_are_inferred_too(network: Any) -> None:
    assert Architecture.of(network.state_dict(), Path("x"), "y") == Architecture(24, 2, 2, (1,), 48, SIDE, 16)


def test_it_is_frozen(model: SamMed3D, embeddings: dict[int, Tensor]) -> None:
    answer = model.segment(embeddings, Prompts(points=(Point((16, 16, 16)),)), LONG)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
    assert not any(each.requires_grad for each in (*embeddings.values(), answer.probability))


def test_an_embedding_is_an_ordinary_tensor(embeddings: dict[int, Tensor]) -> None:
    assert tuple(embeddings) == (0, 1, 2, 3, 4)
    for each in embeddings.values():
        assert (tuple(each.shape), each.dtype, each.is_inference()) == ((48, 2, 2, 2), torch.float32, False)


def test_a_cube_is_encoded_as_in_the_published_inference(network: Any, cube: dict[int, Tensor]) -> None:
    assert torch.allclose(cube[0], encode(network, _scan(CUBE) - _scan(CUBE).min()), atol=1e-4)


@pytest.mark.parametrize(
    ("clicks", "labels"),
    [([(16, 16, 16)], [1]), ([(3, 9, 27), (20, 1, 5)], [1, 0]), ([(20, 1, 5), (31, 31, 0), (7, 7, 8)], [0, 1, 1])],
    ids=["one", "positive and negative", "three"],
)
def test_clicks_are_answered_as_in_the_published_inference(
    model: SamMed3D, network: Any, cube: dict[int, Tensor], clicks: list[tuple[int, int, int]], labels: list[int]
) -> None:
    expected, overlap = decode(network, cube[0], clicks, labels, NOTHING)
    points = tuple(Point(at, bool(sure)) for at, sure in zip(clicks, labels, strict=True))
    answer = model.segment(cube, Prompts(points=points), CUBE)
    assert torch.allclose(answer.probability, expected, atol=1e-5)
    assert answer.quality == {0: pytest.approx(min(max(overlap, 0), 1), abs=1e-5)}
    assert float(expected.std()) > 1e-3  # the answer is not constant


@pytest.mark.parametrize("clicks", [[], [(16, 16, 16)]], ids=["alone", "with a click"])
def test_the_decoder_gets_a_mask_as_logits(
    model: SamMed3D, network: Any, cube: dict[int, Tensor], clicks: list[tuple[int, int, int]]
) -> None:
    mask = torch.rand(CUBE.shape, generator=torch.Generator().manual_seed(2))
    low = F.avg_pool3d(torch.log(mask / (1 - mask))[None, None], 4)[0, 0]
    expected, _ = decode(network, cube[0], clicks, [1] * len(clicks), low)
    answer = model.segment(cube, Prompts(points=tuple(Point(at) for at in clicks), mask=mask), CUBE)
    assert torch.allclose(answer.probability, expected, atol=1e-4)
    without, _ = decode(network, cube[0], clicks, [1] * len(clicks), NOTHING)
    assert not torch.allclose(answer.probability, without, atol=1e-3)


def test_overlapping_cubes_are_averaged(model: SamMed3D, network: Any, embeddings: dict[int, Tensor]) -> None:
    prompts = Prompts(points=(Point((2, 5, 6)), Point((57, 20, 9)), Point((30, 4, 4), positive=False)))
    assert model.units(prompts, LONG) == (0, 4)
    image = _scan(LONG) - _scan(LONG).min()
    first, _ = decode(network, encode(network, image[:32]), [(2, 5, 6), (30, 4, 4)], [1, 0], NOTHING)
    last, _ = decode(network, encode(network, image[28:]), [(29, 20, 9), (2, 4, 4)], [1, 0], NOTHING)
    answer = model.segment(embeddings, prompts, LONG)
    expected = torch.cat([first[:28], (first[28:] + last[:4]) / 2, last[4:]])
    assert torch.allclose(answer.probability, expected, atol=1e-4)
    assert tuple(answer.quality) == (0, 4)
    assert all(0 <= quality <= 1 for quality in answer.quality.values())


def test_each_cube_gets_its_part_of_the_mask(model: SamMed3D, network: Any, embeddings: dict[int, Tensor]) -> None:
    mask = torch.rand(LONG.shape, generator=torch.Generator().manual_seed(2)) / 3
    mask[50:55, 10:20, 10:20] = 0.9
    (unit,) = model.units(Prompts(mask=mask), LONG)
    expected, _ = decode(network, embeddings[unit], [], [], mask_logits(mask[28:]))
    answer = model.segment(embeddings, Prompts(mask=mask), LONG)
    assert torch.allclose(answer.probability[28:], expected, atol=1e-4)
    assert not answer.probability[:28].any()


def test_a_mask_is_certain_background_beyond_the_scan(model: SamMed3D, network: Any) -> None:
    small = VolumeGrid((24, 32, 32), (1.5, 1.5, 1.5))
    embedded = model.embed(_scan(small), small, [0])
    low = torch.full((8, 8, 8), math.log(0.7 / 0.3))
    low[0] = low[-1] = math.log(1e-4 / (1 - 1e-4))
    expected, _ = decode(network, embedded[0], [], [], low)
    answer = model.segment(embedded, Prompts(mask=torch.full(small.shape, 0.7)), small)
    assert torch.allclose(answer.probability, expected[4:28], atol=1e-4)


def test_embeddings_of_other_cubes_change_nothing(model: SamMed3D, embeddings: dict[int, Tensor]) -> None:
    prompts = Prompts(points=(Point((16, 16, 16)),))
    (unit,) = model.units(prompts, LONG)
    alone, among = (model.segment(each, prompts, LONG) for each in ({unit: embeddings[unit]}, embeddings))
    assert torch.equal(alone.probability, among.probability)
    assert alone.quality == among.quality


@pytest.mark.parametrize("points", [(), (Point((3, 3, 3), positive=False),)], ids=["nothing", "a negative click"])
def test_without_a_positive_prompt_the_answer_is_empty(model: SamMed3D, points: tuple[Point, ...]) -> None:
    answer = model.segment({}, Prompts(points=points), LONG)
    assert tuple(answer.probability.shape) == LONG.shape
    assert not answer.probability.any()
    assert answer.quality == {}


def test_a_prompt_on_a_crop_without_an_embedding_is_refused(model: SamMed3D, embeddings: dict[int, Tensor]) -> None:
    prompts = Prompts(points=(Point((2, 5, 6)), Point((57, 20, 9))))
    with pytest.raises(ValueError, match=r"no embedding for the prompted crops \[4\]; embed units\(prompts\) first"):
        model.segment({0: embeddings[0]}, prompts, LONG)


def test_a_click_outside_the_scan_is_refused(model: SamMed3D, embeddings: dict[int, Tensor]) -> None:
    prompts = Prompts(points=(Point((60, 5, 6)),))
    for ask in (lambda: model.units(prompts, LONG), lambda: model.segment(embeddings, prompts, LONG)):
        with pytest.raises(ValueError, match="lies outside the scan"):
            ask()


@pytest.mark.parametrize(
    ("volume", "units", "says"),
    [
        (torch.zeros(8, 8), [0], r"the scan has shape \(8, 8\), its grid \(60, 32, 32\); they must be equal"),
        (torch.zeros(LONG.shape), [0, 5], "there is no crop 5; this scan has crops 0 to 4"),
        (torch.full(LONG.shape, math.nan), [0], "not finite"),
    ],
)
def test_scans_and_crops_that_cannot_be_encoded_are_refused(
    model: SamMed3D, volume: Tensor, units: list[int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        model.embed(volume, LONG, units)


@pytest.mark.parametrize(("gain", "offset"), [(0.01, -3.0), (30.0, 500.0)])
def test_embeddings_do_not_depend_on_the_unit_of_intensity(
    model: SamMed3D, cube: dict[int, Tensor], gain: float, offset: float
) -> None:
    assert torch.allclose(model.embed(_scan(CUBE) * gain + offset, CUBE, [0])[0], cube[0], atol=2e-2)


def test_a_cubes_foreground_has_mean_0_and_standard_deviation_1() -> None:
    cube = torch.zeros(8, 8, 8)
    cube[2:6] = 10 + torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = standardised(cube)
    assert float(found[2:6].mean()) == pytest.approx(0, abs=1e-4)
    assert float(found[2:6].std()) == pytest.approx(1, abs=1e-4)
    assert len(found[:2].unique()) == 1
    assert float(found[0, 0, 0]) < -20


@pytest.mark.parametrize("cube", [torch.zeros(4, 4, 4), torch.full((4, 4, 4), 3.0), torch.eye(4).expand(4, 4, 4) * 0.0])
def test_a_constant_cube_becomes_0(cube: Tensor) -> None:
    assert not standardised(cube).any()


def test_mask_logits_match_the_probability_and_are_finite() -> None:
    cube = torch.full((8, 8, 8), 0.8)
    cube[4:] = 0
    cube[:4, 4:] = 1
    found = mask_logits(cube)
    assert tuple(found.shape) == (2, 2, 2)
    assert found[0, 0].tolist() == pytest.approx([math.log(4)] * 2, abs=1e-4)
    assert found[0, 1].tolist() == pytest.approx([9.21] * 2, abs=0.01)
    assert found[1].flatten().tolist() == pytest.approx([-9.21] * 4, abs=0.01)


def test_the_decoders_answer_survives_the_way_back_as_a_mask() -> None:
    cells = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"), -1)
    coarse = 6 - 1.5 * (cells - torch.tensor([6.0, 8.0, 9.0])).norm(dim=-1)
    answer = F.interpolate(coarse[None, None], scale_factor=4, mode="trilinear", align_corners=False)
    found = mask_logits(torch.sigmoid(answer)[0, 0])
    sure = coarse.abs() < 8  # beyond, probabilities are clamped
    assert torch.allclose(found[sure], coarse[sure], atol=1.0)
    assert float((found[sure] - coarse[sure]).abs().mean()) < 0.2


@settings(deadline=None, max_examples=40)
@given(data=st.data(), spacing=st.tuples(*[st.floats(0.6, 4.0)] * 3))
def test_the_answer_to_a_click_surrounds_it_for_any_voxel_size(data: Any, spacing: tuple[float, ...]) -> None:
    h, w, d = (max(4, round(data.draw(st.floats(20, 90)) / mm)) for mm in spacing)
    grid = VolumeGrid((h, w, d), (spacing[0], spacing[1], spacing[2]))
    at = data.draw(st.tuples(*(st.integers(0, length - 1) for length in grid.shape)))
    painter = SamMed3D(cards.SAM_MED3D, Painter(), "0" * 64, CPU)
    prompts = Prompts(points=(Point(at),))
    empty: Mapping[int, Tensor] = {unit: torch.zeros(1) for unit in painter.units(prompts, grid)}
    answer = painter.segment(empty, prompts, grid)
    assert list(answer.quality.values()) == [1.0]
    grids = torch.meshgrid(*(torch.arange(length) for length in grid.shape), indexing="ij")
    scale = CropLattice(grid, SIDE).scale
    distance = torch.stack([(axis - c) * s for axis, c, s in zip(grids, at, scale, strict=True)]).norm(dim=0)
    # Interpolation over low-resolution voxels (4) and the scan's voxels (up to 2.7) blurs the ball's surface.
    assert bool((answer.probability[distance < 3] > 0.5).all())
    assert bool((answer.probability[distance > 9.5] < 0.5).all())


def test_the_training_arguments_are_allowed_for_this_file_only(weights: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    SamMed3D.load(cards.SAM_MED3D, CPU, weights)
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before


def test_any_other_object_in_the_file_is_refused(network: Any, tmp_path: Path) -> None:
    torch.save({"model_state_dict": network.state_dict(), "args": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w.pth: not a file of PyTorch tensors that can be read safely"):
        SamMed3D.load(cards.SAM_MED3D, CPU, tmp_path / "w.pth")


def test_weights_of_another_hash_are_refused(weights: Path) -> None:
    with pytest.raises(WeightsError, match=rf"has SHA-256 .*, expected {'0' * 64}; accepted is sam_med3d.pth of"):
        SamMed3D.load(cards.SAM_MED3D, CPU, weights, "0" * 64)


def test_weights_of_the_expected_hash_are_accepted(weights: Path, model: SamMed3D) -> None:
    assert SamMed3D.load(cards.SAM_MED3D, CPU, weights, model.weights_sha256.upper()).weights_sha256


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"weight": torch.zeros(2)},
        lambda state: _without(state, "image_encoder.pos_embed"),
        lambda state: _without(state, "mask_decoder.iou_token.weight"),
        lambda state: state | {"image_encoder.pos_embed": torch.zeros(1, 4, 4, 24)},
        lambda state: state | {"image_encoder.neck.0.weight": torch.zeros(40, 24, 1, 1, 1)},
        lambda state: state | {"image_encoder.blocks.0.attn.rel_pos_d": torch.zeros(13, 12)},
        lambda state: state | {"further": torch.zeros(2)},
    ],
    ids=["nothing of it", "no positions", "no token", "2D", "40 channels", "windows of 7", "more"],
)
def test_weights_that_do_not_fit_are_refused(network: Any, tmp_path: Path, change: Any) -> None:
    torch.save({"model_state_dict": change(dict(network.state_dict()))}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth: these weights do not fit SAM.?Med3D"):
        SamMed3D.load(cards.SAM_MED3D, CPU, tmp_path / "other.pth")


def test_loading_prints_nothing_and_changes_neither_warning_filters_nor_random_state(weights: Path) -> None:
    script = f"""
import json, sys, warnings, torch
from pathlib import Path
from semisam_core.generalists import cards
from semisam_core.generalists.sam_med3d import SamMed3D
lazy = "medim" not in sys.modules
filters, state = list(warnings.filters), torch.get_rng_state()
SamMed3D.load(cards.SAM_MED3D, torch.device("cpu"), Path({str(weights)!r}))
print(json.dumps([lazy, filters == list(warnings.filters), torch.equal(state, torch.get_rng_state())]))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(ended.stdout) == [True, True, True]
    assert ended.stderr == ""


def test_its_embeddings_are_features_that_a_head_can_read(model: SamMed3D, tmp_path: Path) -> None:
    reader = FeatureReader(model, EmbeddingStore(tmp_path, 10**9), 4.0, 1.0)
    image = torch.rand(1, 40, 20, 24, generator=torch.Generator().manual_seed(0))
    seen = reader.read(image, (1.5, 1.5, 1.5), "volume")
    side = seen.values.shape[-1]
    assert seen.values.shape == (len(seen.space.units), 48, side, side, side)
    embeddings = model.embed(image[0], seen.space.grid, seen.space.units)
    assert len(seen.space.units) > 1
    for number, unit in enumerate(seen.space.units):
        assert embeddings[unit].shape == seen.values[number].shape
    assert bool(torch.isfinite(seen.values).all())
    assert bool(seen.inside.any())
