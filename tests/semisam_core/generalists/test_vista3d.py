"""VISTA3D with small random weights: it answers as MONAI's network does, and clicks arrive at their voxels."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import SegResNetDS2
from monai.networks.nets.vista3d import VISTA3D, ClassMappingClassify, PointMappingSAM, vista3d132
from torch import Tensor, nn

from semisam_core.errors import WeightsError
from semisam_core.generalists import EmbeddingStore, Point, PromptKind, Prompts, SliceBox, VolumeGrid, load_generalist
from semisam_core.generalists.crops import CropLattice
from semisam_core.generalists.slices import intensity_limits
from semisam_core.generalists.vista3d import Vista3D, confidence, read_architecture, stretch_between

CPU = torch.device("cpu")
SIDE = 32
CUBE = VolumeGrid((SIDE, SIDE, SIDE), (1.5, 1.5, 1.5))  # one crop, without resampling or padding
LONG = VolumeGrid((SIDE, SIDE, 50), (1.5, 1.5, 1.5))  # several crops along the last axis
CLICKS = Prompts(points=(Point((20, 9, 14)), Point((5, 25.5, 30), positive=False)))
NOVEL = torch.tensor([[200]])  # in MONAI, a class above 132 is one that it was not trained on


def _official(width: int = 8, seed: int = 0) -> nn.Module:
    """Return MONAI's VISTA3D in its published layout, narrow, with weights that spread its answers around 0.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = vista3d132(encoder_embed_dim=width)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return network.eval()


@pytest.fixture(scope="module")
def official() -> nn.Module:
    return _official()


@pytest.fixture(scope="module")
def weights(official: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(official.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> Vista3D:
    return Vista3D.load(CPU, weights, side=SIDE)


def _scan(grid: VolumeGrid, seed: int = 0) -> Tensor:
    """Return a noisy scan in arbitrary units that is brighter towards the end of each axis."""
    ramps = torch.meshgrid(*(torch.linspace(0, 1, length) for length in grid.shape), indexing="ij")
    noise = torch.randn(grid.shape, generator=torch.Generator().manual_seed(seed))
    return 40 * (ramps[0] + 2 * ramps[1] - ramps[2]) + 20 * noise - 7


def _ask(model: Vista3D, volume: Tensor, prompts: Prompts, grid: VolumeGrid) -> Any:
    return model.segment(model.embed(volume, grid, model.units(prompts, grid)), prompts, grid)


@torch.inference_mode()
def _by_monai(network: nn.Module, cube: Tensor, prompts: Prompts) -> Tensor:
    logits = network(
        cube[None, None],
        point_coords=torch.tensor([[point.position for point in prompts.points]], dtype=torch.float32),
        point_labels=torch.tensor([[int(point.positive) for point in prompts.points]]),
        prompt_class=NOVEL,
    )
    return torch.sigmoid(logits[0, 0])


class Recorded:
    """Records what a model's network is given while it is active."""

    def __init__(self, model: Vista3D) -> None:
        self.cubes: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.labels: list[list[int]] = []
        self._hooks = [
            model.network.image_encoder.register_forward_pre_hook(lambda _, args: self.cubes.append(args[0][0, 0])),
            model.network.point_head.register_forward_pre_hook(self._head),
        ]

    def _head(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        features, positions, labels = args
        of_the_cube = SIDE / features.shape[-1]
        self.positions += list((positions[0] + 0.5) * of_the_cube - 0.5)
        self.labels.append(labels[0].tolist())

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def test_it_takes_only_clicks_in_3d_and_names_its_licence(model: Vista3D, weights: Path) -> None:
    assert model.card.prompt_kinds == {PromptKind.POINTS_3D}
    assert model.card.name == "vista3d"
    assert "not commercial" in model.card.licence
    assert model.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_it_answers_a_crop_as_monais_network_does(model: Vista3D, official: nn.Module) -> None:
    volume = _scan(CUBE)
    answer = _ask(model, volume, CLICKS, CUBE).probability
    expected = _by_monai(official, stretch_between(volume, intensity_limits(volume)), CLICKS)
    assert expected.std() > 0.02
    assert torch.allclose(answer, expected, atol=1e-5)


def test_clicks_are_for_a_class_that_it_was_not_trained_on(model: Vista3D, official: nn.Module) -> None:
    volume = _scan(CUBE)
    cube = stretch_between(volume, intensity_limits(volume))
    with torch.inference_mode():
        trained = official(
            cube[None, None],
            point_coords=torch.tensor([[point.position for point in CLICKS.points]]),
            point_labels=torch.tensor([[1, 0]]),
            prompt_class=torch.tensor([[132]]),
        )
    assert not torch.allclose(_ask(model, volume, CLICKS, CUBE).probability, torch.sigmoid(trained[0, 0]), atol=1e-3)


def test_overlapping_crops_are_averaged(model: Vista3D, official: nn.Module) -> None:
    volume = _scan(LONG)
    prompts = Prompts(points=(Point((16, 16, 3)), Point((12, 20, 47)), Point((9, 9, 20), positive=False)))
    cubes = stretch_between(volume, intensity_limits(volume))
    total, count = torch.zeros(LONG.shape), torch.zeros(LONG.shape)
    for start in (0, 18):
        inside = [point for point in prompts.points if start <= point.position[2] < start + SIDE]
        moved = tuple(replace(point, position=(*point.position[:2], point.position[2] - start)) for point in inside)
        total[:, :, start : start + SIDE] += _by_monai(
            official, cubes[:, :, start : start + SIDE], Prompts(points=moved)
        )
        count[:, :, start : start + SIDE] += 1
    assert count.max() == 2
    assert torch.allclose(_ask(model, volume, prompts, LONG).probability, total / count, atol=1e-5)


def test_only_the_crops_around_positive_clicks_are_needed(model: Vista3D) -> None:
    lattice = CropLattice(LONG, SIDE)
    near = Prompts(points=(Point((16, 16, 3)), Point((16, 16, 49), positive=False)))
    assert [lattice.origin(unit) for unit in model.units(near, LONG)] == [(0, 0, 0)]
    assert model.units(Prompts(points=near.points[1:]), LONG) == ()
    answer = _ask(model, _scan(LONG), near, LONG).probability
    assert answer[:, :, :SIDE].all()
    assert not answer[:, :, SIDE:].any()


def test_without_a_positive_click_the_answer_is_empty(model: Vista3D) -> None:
    for prompts in (Prompts(), Prompts(points=(Point((3, 3, 3), positive=False),))):
        answer = model.segment({}, prompts, CUBE)
        assert not answer.probability.any()
        assert answer.quality == {}


grids = st.builds(
    VolumeGrid,
    st.tuples(*[st.integers(12, 60)] * 3),
    st.tuples(*[st.floats(0.8, 4.0)] * 3),
)


@settings(deadline=None, max_examples=25)
@given(grid=grids, axis=st.integers(0, 2), share=st.tuples(*[st.floats(0, 1)] * 3))
def test_a_click_arrives_at_its_voxel_in_the_crop(
    model: Vista3D, grid: VolumeGrid, axis: int, share: tuple[float, float, float]
) -> None:
    """The scan contains its voxel numbers along one axis; the crop has the same number at the click."""
    margins = [math.ceil(2 * 1.5 / mm) + 1 for mm in grid.spacing_mm]  # voxels near a border have no neighbour there
    last = [length - 1 for length in grid.shape]
    click = [
        min(margin, end / 2) + part * max(0.0, end - 2 * margin)
        for margin, end, part in zip(margins, last, share, strict=True)
    ]
    numbers = torch.arange(grid.shape[axis], dtype=torch.float32)
    volume = numbers.view([-1 if each == axis else 1 for each in range(3)]).expand(grid.shape)
    with Recorded(model) as recorded:
        answer = _ask(model, volume, Prompts(points=(Point((click[0], click[1], click[2])),)), grid)
    assert len(recorded.cubes) == len(recorded.positions) == 1
    assert recorded.labels == [[1]]
    shown = _interpolate(recorded.cubes[0], recorded.positions[0].tolist()) * last[axis]
    assert shown == pytest.approx(click[axis], abs=1e-2)
    assert answer.probability.shape == grid.shape
    assert answer.probability[tuple(round(at) for at in click)] > 0


def _interpolate(cube: Tensor, position: list[float]) -> float:
    where = torch.tensor([(2 * at + 1) / SIDE - 1 for at in reversed(position)]).view(1, 1, 1, 1, 3)
    return float(nn.functional.grid_sample(cube[None, None], where, align_corners=False, padding_mode="border"))


def test_negative_clicks_arrive_as_negative(model: Vista3D) -> None:
    with Recorded(model) as recorded:
        _ask(model, _scan(CUBE), CLICKS, CUBE)
    assert recorded.labels == [[1, 0]]
    arrived = torch.stack(recorded.positions).tolist()
    assert arrived == [pytest.approx(point.position, abs=1e-4) for point in CLICKS.points]


def test_a_negative_click_changes_the_answer(model: Vista3D) -> None:
    volume = _scan(CUBE)
    alone = _ask(model, volume, Prompts(points=CLICKS.points[:1]), CUBE)
    both_positive = _ask(model, volume, Prompts(points=tuple(Point(point.position) for point in CLICKS.points)), CUBE)
    answer = _ask(model, volume, CLICKS, CUBE)
    assert not torch.allclose(answer.probability, alone.probability, atol=1e-3)
    assert not torch.allclose(answer.probability, both_positive.probability, atol=1e-3)


def test_successive_clicks_on_a_crop_encode_it_once(model: Vista3D, tmp_path: Path) -> None:
    volume, store = _scan(CUBE), EmbeddingStore(tmp_path, 10**9)
    with Recorded(model) as recorded:
        for count in (1, 2):
            prompts = Prompts(points=CLICKS.points[:count])
            embeddings = store.fetch(model, "scan", volume, CUBE, model.units(prompts, CUBE))
            model.segment(embeddings, prompts, CUBE)
    assert recorded.labels == [[1], [1, 0]]
    assert len(recorded.cubes) == 1


def test_an_embedding_is_an_ordinary_tensor_of_an_eighth_of_the_voxels(model: Vista3D) -> None:
    embeddings = model.embed(_scan(LONG), LONG, [0, 2])
    assert list(embeddings) == [0, 2]
    for each in embeddings.values():
        assert (tuple(each.shape), each.dtype, each.is_contiguous()) == ((8, 16, 16, 16), torch.float32, True)
        assert not each.is_inference()
    assert not torch.equal(embeddings[0], embeddings[2])


def test_half_precision_in_the_store_hardly_changes_the_answer(model: Vista3D) -> None:
    embeddings = model.embed(_scan(CUBE), CUBE, [0])
    halved = {unit: each.half().float() for unit, each in embeddings.items()}
    exact, rounded = (model.segment(each, CLICKS, CUBE).probability for each in (embeddings, halved))
    assert torch.allclose(exact, rounded, atol=1e-2)


def test_answers_do_not_depend_on_earlier_prompts(model: Vista3D) -> None:
    scans = [_scan(CUBE, seed) for seed in (0, 1)]
    forwards = [_ask(model, scan, CLICKS, CUBE).probability for scan in scans]
    backwards = [_ask(model, scan, CLICKS, CUBE).probability for scan in reversed(scans)]
    assert not torch.equal(*forwards)
    assert all(torch.equal(*pair) for pair in zip(forwards, reversed(backwards), strict=True))


def test_it_is_frozen(model: Vista3D) -> None:
    before = {name: each.clone() for name, each in model.network.state_dict().items()}
    answer = _ask(model, _scan(CUBE), CLICKS, CUBE)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
    assert not answer.probability.requires_grad
    assert all(torch.equal(each, before[name]) for name, each in model.network.state_dict().items())


@settings(deadline=None, max_examples=5)
@given(gain=st.floats(0.01, 100), offset=st.floats(-500, 500))
def test_the_answer_does_not_depend_on_the_unit_of_intensity(model: Vista3D, gain: float, offset: float) -> None:
    volume = _scan(CUBE)
    answers = [_ask(model, each, CLICKS, CUBE).probability for each in (volume, volume * gain + offset)]
    assert torch.allclose(*answers, atol=5e-2)


def test_the_encoder_sees_the_scan_between_0_and_1_padded_with_zeros(model: Vista3D) -> None:
    grid = VolumeGrid((20, 24, 16), (1.5, 1.5, 1.5))
    with Recorded(model) as recorded:
        model.embed(_scan(grid), grid, [0])
    (cube,) = recorded.cubes
    assert (float(cube.min()), float(cube.max())) == (0, 1)
    assert tuple(cube.shape) == (SIDE, SIDE, SIDE)
    around = cube.clone()
    around[6:26, 4:28, 8:24] = 0
    assert not around.any()


def test_a_constant_scan_becomes_black() -> None:
    assert not stretch_between(torch.full((4, 4, 4), 7.0), (7.0, 7.0)).any()


def test_quality_is_the_mean_probability_of_the_foreground_without_padding(model: Vista3D) -> None:
    grid = VolumeGrid((20, 24, 16), (1.5, 1.5, 1.5))
    answer = _ask(model, _scan(grid), Prompts(points=(Point((10, 10, 8)),)), grid)
    foreground = answer.probability[answer.probability > 0.5]
    assert 0 < len(foreground) < answer.probability.numel()
    assert answer.quality == {0: pytest.approx(float(foreground.mean()), abs=1e-5)}


def test_quality_is_0_without_foreground() -> None:
    assert confidence(torch.tensor([0.5, 0.1, 0.0])) == 0
    assert confidence(torch.tensor([])) == 0


@pytest.mark.parametrize("position", [(-1.0, 3.0, 3.0), (3.0, 31.5, 3.0), (3.0, 3.0, math.nan)])
@pytest.mark.parametrize("positive", [True, False])
def test_clicks_outside_the_scan_are_refused(
    model: Vista3D, position: tuple[float, float, float], positive: bool
) -> None:
    prompts = Prompts(points=(Point((3, 3, 3)), Point(position, positive)))
    for ask in (lambda: model.units(prompts, CUBE), lambda: model.segment({}, prompts, CUBE)):
        with pytest.raises(ValueError, match="lies outside the scan"):
            ask()


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [
        (Prompts(boxes=(SliceBox(2, (0, 0, 5, 5)),)), "box-2d"),
        (replace(CLICKS, mask=torch.zeros(CUBE.shape)), "mask-3d"),
        (replace(CLICKS, span=(0, 3)), "propagated"),
    ],
)
def test_other_prompts_are_refused(model: Vista3D, prompts: Prompts, kind: str) -> None:
    for ask in (lambda: model.units(prompts, CUBE), lambda: model.segment({}, prompts, CUBE)):
        with pytest.raises(ValueError, match=f"vista3d takes no prompts of kind {kind}; accepted: points-3d"):
            ask()


def test_a_click_in_a_crop_without_an_embedding_is_refused(model: Vista3D) -> None:
    with pytest.raises(ValueError, match=r"no embedding for the prompted crops \[0\]"):
        model.segment({}, CLICKS, CUBE)


@pytest.mark.parametrize(
    ("volume", "units", "says"),
    [
        (torch.zeros(8, 8), [0], r"the scan has shape \(8, 8\), its grid \(32, 32, 32\)"),
        (torch.zeros(32, 32, 31), [0], "they must be equal"),
        (_scan(CUBE), [0, 1], "there is no crop 1"),
        (torch.full(CUBE.shape, math.nan), [0], "not finite"),
    ],
)
def test_scans_and_crops_that_cannot_be_encoded_are_refused(
    model: Vista3D, volume: Tensor, units: list[int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        model.embed(volume, CUBE, units)


@pytest.mark.parametrize("side", [0, -32, 40, 16])
def test_crops_that_the_network_cannot_halve_are_refused(model: Vista3D, side: int) -> None:
    with pytest.raises(ValueError, match=f"a side divisible by 32, not {side}"):
        Vista3D(model.network, "0" * 64, CPU, side)


def test_loaded_weights_are_the_saved_ones(model: Vista3D, official: nn.Module) -> None:
    loaded, saved = model.network.state_dict(), official.state_dict()
    parts = {
        "image_encoder.": "image_encoder.",
        "reduction.": "point_head.feat_downsample.",
        "point_head.": "point_head.",
    }
    for name, each in loaded.items():
        part = next(part for part in parts if name.startswith(part))
        assert torch.equal(each, saved[parts[part] + name.removeprefix(part)])
    unused = {name for name in saved if name.startswith(("class_head.", "image_encoder.up_layers_auto."))}
    assert len(loaded) == len(saved) - len(unused)


def test_sizes_are_inferred_from_the_weights(tmp_path: Path) -> None:
    other = VISTA3D(
        SegResNetDS2(blocks_down=(2, 1), norm="instance", out_channels=16, init_filters=16),
        ClassMappingClassify(5, 16),
        PointMappingSAM(16, n_classes=5),
    )
    torch.save({"model": other.state_dict()}, tmp_path / "model.pt")
    sizes = read_architecture(other.state_dict(), tmp_path / "model.pt")
    assert (sizes.width, sizes.blocks, sizes.classes) == (16, (2, 1), 5)
    assert tuple(Vista3D.load(CPU, tmp_path / "model.pt", side=4).embed(_scan(CUBE), CUBE, [0])[0].shape) == (
        16,
        2,
        2,
        2,
    )


def test_the_registry_loads_it_with_the_published_crop_side(weights: Path) -> None:
    loaded = load_generalist("vista3d", CPU, weights, hashlib.sha256(weights.read_bytes()).hexdigest())
    assert isinstance(loaded, Vista3D)
    assert len(loaded.units(Prompts(points=(Point((3, 3, 3)),)), VolumeGrid((128, 128, 128), (1.5, 1.5, 1.5)))) == 1
    with pytest.raises(ValueError, match="there is no crop 1"):
        loaded.embed(torch.zeros(128, 128, 128), VolumeGrid((128, 128, 128), (1.5, 1.5, 1.5)), [1])


def test_without_a_weights_file_the_error_says_where_one_is_published() -> None:
    with pytest.raises(WeightsError, match=r"MONAI bundle vista3d .*research or evaluation only"):
        Vista3D.load(CPU, None)


def test_weights_of_another_hash_are_refused(weights: Path) -> None:
    with pytest.raises(WeightsError, match=rf"model.pt: .* expected {'0' * 64}"):
        Vista3D.load(CPU, weights, "0" * 64)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("mlp.linear", "mlp.lin"): each for name, each in state.items()}  # as by MONAI 1.3


def _without(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {each: tensor for each, tensor in state.items() if each != name}


STEM = "image_encoder.encoder.conv_init.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: {"weight": torch.zeros(2)}, f"{STEM} is missing"),
        (_renamed, "tensors found"),
        (lambda state: _without("point_head.zeroshot_embed.weight", state), "tensors found"),
        (lambda state: state | {"extra": torch.zeros(1)}, "tensors found"),
        (lambda state: _without("point_head.class_embeddings.weight", state), "point_head.class_embeddings.weight is"),
        (lambda state: state | {STEM: torch.zeros(8, 2, 3, 3, 3)}, "not 3D from one channel"),
        (lambda state: state | {STEM: torch.zeros(12, 1, 3, 3, 3)}, "a multiple of 8"),
        (lambda state: {name: each for name, each in state.items() if ".layers." not in name}, "two resolutions"),
    ],
)
def test_weights_that_do_not_fit_are_refused(official: nn.Module, tmp_path: Path, change: Any, says: str) -> None:
    torch.save(change(official.state_dict()), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=rf"other.pt: these weights do not fit .*{says}"):
        Vista3D.load(CPU, tmp_path / "other.pt")


def test_loading_does_not_change_the_random_state(weights: Path) -> None:
    before = torch.get_rng_state()
    Vista3D.load(CPU, weights, side=SIDE)
    assert torch.equal(torch.get_rng_state(), before)
