"""A cold start: prototypes from labeled scans find the same structures on unlabeled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.errors import ConfigError
from semisam_core.evaluation import dice_of
from semisam_core.generalists import EmbeddingStore, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.slices import FeatureMaps, Framing
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.cold_start import (
    ColdStarter,
    Prototypes,
    background_only,
    cold_start_of,
    spherical_k_means,
)
from semisam_core.pseudo_labels.policy import policy_of
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import CARD

SECTION = "pseudo_labels.cold_start"
COLD = f"{SECTION}={{until_round: 1, generalist: fake}}"
TWO_CLASSES = "task.classes=[{name: first, value: 1}, {name: second, value: 2}]"
CODES = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.5]])  # a feature vector per class


class ClassEncoder:
    """An encoder for scans whose intensities are class numbers; each class has its own feature vector."""

    def __init__(self, stretched: bool = False, stride: int = 4) -> None:
        self.card = CARD
        self.weights_sha256 = "2" * 64
        self.framing = Framing(128, stretched)
        self.embedded: list[int] = []
        self._side = 128 // stride

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        return ()

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        self.embedded += list(units)
        return {unit: self._encode(volume[:, :, unit]) for unit in units}

    def feature_map(self, embedding: Tensor) -> Tensor:
        return embedding.permute(2, 0, 1)

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        raise AssertionError("a cold start does not prompt generalists")

    def _encode(self, plane: Tensor) -> Tensor:
        """Return the feature vector of the class at the middle of each patch, looked up directly: (S, S, 4)."""
        rows, columns = self.framing.size((int(plane.shape[0]), int(plane.shape[1])))
        centres = (torch.arange(self._side) + 0.5) * self.framing.side / self._side
        down = (centres / rows * plane.shape[0]).long().clamp_max(plane.shape[0] - 1)
        across = (centres / columns * plane.shape[1]).long().clamp_max(plane.shape[1] - 1)
        return CODES[plane[down][:, across].long()]


def _plan(*changes: str) -> Plan:
    return tiny_plan(COLD, f"{SECTION}.position_weight=0.0", "pseudo_labels.smooth_sigma_slices=0.0", *changes)


def _boxes(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> Tensor:
    label = torch.zeros(shape, dtype=torch.uint8)
    for k, box in enumerate(boxes, start=1):
        label[box] = k
    return label


def _starter(folder: Path, plan: Plan, model: ClassEncoder | None = None) -> ColdStarter:
    settings = cold_start_of(policy_of(plan))
    return ColdStarter(model or ClassEncoder(), EmbeddingStore(folder / "embeddings", 10**9), plan, settings)


def _image(label: Tensor) -> Tensor:
    return label.float()[None]


LABELED = _boxes((40, 56, 6), (slice(8, 24), slice(10, 34), slice(1, 5)))
OTHER = _boxes((64, 32, 5), (slice(30, 54), slice(4, 20), slice(2, 4)))


def test_a_class_is_found_on_a_scan_of_another_shape(tmp_path: Path) -> None:
    starter = _starter(tmp_path, _plan())
    rough = starter.rough(_image(OTHER), starter.learn([(_image(LABELED), LABELED)]))
    assert rough.shape == (2, *OTHER.shape)
    assert torch.allclose(rough.sum(0), torch.ones(OTHER.shape), atol=1e-5)
    assert dice_of(rough[1] > 0.5, OTHER > 0) > 0.9


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(24, 90),
    width=st.integers(24, 90),
    stretched=st.booleans(),
    top=st.floats(0, 0.5),
    left=st.floats(0, 0.5),
)
def test_a_mask_on_a_slice_of_any_proportions_maps_back_to_its_place(
    height: int, width: int, stretched: bool, top: float, left: float
) -> None:
    framing = Framing(128, stretched)
    mask = torch.zeros(1, height, width)
    first, start = int(top * height), int(left * width)
    mask[0, first : first + height // 2, start : start + width // 2] = 1
    shares = framing.shares(mask, 32)
    assert float(shares.max()) <= 1 + 1e-5
    rows, columns = framing.size((height, width))
    assert float(shares.sum()) * 16 / (rows * columns) == pytest.approx(float(mask.mean()), abs=0.02)
    back = framing.spread(shares, (height, width))
    assert back.shape == mask.shape
    assert dice_of(back > 0.5, mask > 0.5) > 0.85
    assert torch.allclose(framing.spread(torch.ones(1, 32, 32), (height, width)), torch.ones(1, height, width))


@settings(deadline=None, max_examples=25)
@given(height=st.integers(8, 90), width=st.integers(8, 90), stretched=st.booleans())
def test_features_in_the_padding_reach_no_voxel(height: int, width: int, stretched: bool) -> None:
    framing = Framing(128, stretched)
    covered = framing.shares(torch.ones(1, height, width), 32)
    assert bool((framing.spread((covered == 0).float(), (height, width)) == 0).all())


class TwoScanners(ClassEncoder):
    """Features of a second scanner, whose intensities start at 10, are all shifted towards those of class 1."""

    def _encode(self, plane: Tensor) -> Tensor:
        second = float(plane.min()) >= 10
        return super()._encode(plane - 10 * second) + second * 3 * CODES[1]


def test_what_all_features_of_a_scan_have_in_common_does_not_matter(tmp_path: Path) -> None:
    starter = _starter(tmp_path, _plan(), TwoScanners())
    prototypes = starter.learn([(_image(LABELED), LABELED)])
    assert dice_of(starter.rough(_image(OTHER) + 10, prototypes)[1] > 0.5, OTHER > 0) > 0.9


class StrongPadding(ClassEncoder):
    """Features in the padding are large and unlike those of any class."""

    def _encode(self, plane: Tensor) -> Tensor:
        features = super()._encode(plane)
        inside = self.framing.shares(torch.ones(1, *plane.shape), self._side)[0] > 0
        features[~inside] = torch.tensor([0.0, 0.0, 50.0, 0.0])
        return features


def test_features_in_the_padding_do_not_matter(tmp_path: Path) -> None:
    starter = _starter(tmp_path, _plan(), StrongPadding())
    rough = starter.rough(_image(OTHER), starter.learn([(_image(LABELED), LABELED)]))
    assert dice_of(rough[1] > 0.5, OTHER > 0) > 0.9
    assert float(rough[1][OTHER > 0].mean()) > 0.9


def test_a_second_class_is_distinguished_from_the_first_and_from_background(tmp_path: Path) -> None:
    plan = _plan(TWO_CLASSES)
    first, second = (slice(4, 20), slice(4, 20), slice(0, 6)), (slice(24, 38), slice(30, 52), slice(0, 6))
    labeled, other = _boxes((40, 56, 6), first, second), _boxes((40, 56, 6), second, first)
    starter = _starter(tmp_path, plan)
    rough = starter.rough(_image(other), starter.learn([(_image(labeled), labeled)]))
    for k in (1, 2):
        assert dice_of(rough[k] > 0.5, other == k) > 0.9


def test_a_class_that_no_labeled_scan_shows_is_not_found(tmp_path: Path) -> None:
    starter = _starter(tmp_path, _plan(TWO_CLASSES))
    prototypes = starter.learn([(_image(LABELED), LABELED)])
    assert len(prototypes.classes[2]) == 0
    rough = starter.rough(_image(OTHER), prototypes)
    assert float(rough[2].max()) == 0
    assert dice_of(rough[1] > 0.5, OTHER > 0) > 0.9


def test_without_prototypes_a_scan_is_background_and_is_not_encoded(tmp_path: Path) -> None:
    model = ClassEncoder()
    starter = _starter(tmp_path, _plan(), model)
    rough = starter.rough(_image(OTHER), starter.learn([]))
    assert torch.equal(rough, background_only(_image(OTHER), 1))
    assert model.embedded == []


def test_only_slices_on_the_lattice_are_encoded_and_those_between_are_interpolated(tmp_path: Path) -> None:
    model = ClassEncoder()
    starter = _starter(tmp_path, _plan("pseudo_labels.prompting.slice_step_mm=4.0"), model)  # voxels are 2 mm
    deep = _boxes((40, 40, 9), (slice(8, 30), slice(8, 30), slice(2, 7)))
    rough = starter.rough(_image(deep), starter.learn([(_image(deep), deep)]))
    assert sorted(set(model.embedded)) == [0, 2, 4, 6, 8]
    between = (rough[1, :, :, 2] + rough[1, :, :, 4]) / 2
    assert torch.allclose(rough[1, :, :, 3], between, atol=1e-5)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_masks_are_in_the_scans_axes_for_any_plane(tmp_path: Path, plane: str) -> None:
    labeled = _boxes((40, 30, 24), (slice(6, 26), slice(5, 17), slice(8, 22)))
    other = _boxes((30, 40, 24), (slice(4, 14), slice(12, 32), slice(2, 16)))
    starter = _starter(tmp_path, _plan(f"{SECTION}.plane={plane}"))
    rough = starter.rough(_image(other), starter.learn([(_image(labeled), labeled)]))
    assert dice_of(rough[1] > 0.5, other > 0) > 0.9


def test_position_distinguishes_structures_that_look_the_same(tmp_path: Path) -> None:
    def scan(column: int) -> tuple[Tensor, Tensor]:
        image = _boxes((40, 40, 4), (slice(12, 28), slice(2, 14), slice(0, 4)))
        image[12:28, 26:38] = 1  # two alike, left and right
        label = torch.zeros_like(image)
        label[12:28, column : column + 12] = 1
        return _image(image), label

    image, left = scan(2)
    found = {}
    for weight in (0.0, 1.0):
        plan = _plan(f"{SECTION}.position_weight={weight}")
        starter = _starter(tmp_path, plan)
        found[weight] = dice_of(starter.rough(image, starter.learn([(image, left)]))[1] > 0.5, left > 0)
    assert found[1.0] > 0.85
    assert found[0.0] < 0.75


def test_positions_are_relative_to_the_scan_along_each_axis(tmp_path: Path) -> None:
    left, right = slice(2, 14), slice(26, 38)

    def scan(height: int) -> tuple[Tensor, Tensor]:
        rows = slice(3 * height // 10, 7 * height // 10)
        label = _boxes((height, 40, 4), (rows, left, slice(0, 4)))
        image = label.clone()
        image[rows, right] = 1
        return _image(image), label

    starter = _starter(tmp_path, _plan(f"{SECTION}.position_weight=1.0"))
    tall, target = scan(80)  # fills the frame along its rows only, unlike the labeled scan
    rough = starter.rough(tall, starter.learn([scan(40)]))
    assert dice_of(rough[1] > 0.5, target > 0) > 0.85


def test_each_class_has_as_many_prototypes_as_the_plan_says(tmp_path: Path) -> None:
    counts = (f"{SECTION}.background_prototypes=7", f"{SECTION}.foreground_prototypes=3")
    starter = _starter(tmp_path, _plan(f"{SECTION}.position_weight=1.0", *counts))
    prototypes = starter.learn([(_image(LABELED), LABELED)])
    assert [len(each) for each in prototypes.classes] == [7, 3]


def test_the_temperature_sets_how_certain_a_mask_is(tmp_path: Path) -> None:
    certainty = {}
    for temperature in (0.1, 1.0):
        starter = _starter(tmp_path, _plan(f"{SECTION}.temperature={temperature}"))
        rough = starter.rough(_image(OTHER), starter.learn([(_image(LABELED), LABELED)]))
        certainty[temperature] = float(rough[1].max())
    # Two classes alone are opposite directions around the mean: similarities of 1 and -1.
    assert certainty == pytest.approx({0.1: 1.0, 1.0: float(torch.sigmoid(torch.tensor(2.0)))}, abs=0.01)


def test_the_same_scans_give_the_same_prototypes_and_masks_bit_by_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 3, (1, 48, 40, 6), generator=generator).float()
    label = (image[0] == 1).to(torch.uint8)
    plan = tiny_plan(COLD, f"{SECTION}.background_prototypes=5")

    def once(folder: str) -> tuple[Prototypes, Tensor]:
        torch.rand(7)  # changes the global random state
        starter = _starter(tmp_path / folder, plan)
        prototypes = starter.learn([(image, label)])
        return prototypes, starter.rough(image, prototypes)

    state = torch.get_rng_state()
    (first, mask), (again, same) = once("a"), once("b")
    assert torch.equal(mask, same)
    assert all(torch.equal(one, other) for one, other in zip(first.classes, again.classes, strict=True))
    torch.set_rng_state(state)
    _starter(tmp_path / "c", plan).learn([(image, label)])
    assert torch.equal(torch.get_rng_state(), state)


@settings(deadline=None, max_examples=25)
@example(seed=1607, k=4)  # with plain k-means++, two initial centres share a cluster
@given(seed=st.integers(0, 10_000), k=st.integers(1, 6))
def test_k_means_finds_well_separated_directions(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(8)[:k]
    noisy = directions.repeat_interleave(20, 0) + 0.02 * torch.randn((20 * k, 8), generator=generator)
    centres = spherical_k_means(torch.nn.functional.normalize(noisy, dim=1), k, generator)
    assert len(centres) == k
    assert float((centres @ directions.T).amax(0).min()) > 0.99
    assert torch.allclose(centres.norm(dim=1), torch.ones(k), atol=1e-5)


def test_k_means_has_no_more_centres_than_distinct_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.eye(4)[:3]
    assert torch.equal(spherical_k_means(few, 8, generator), few)
    assert len(spherical_k_means(few.repeat(10, 1), 8, generator)) == 3


def test_a_generalist_without_feature_maps_is_refused(tmp_path: Path) -> None:
    class Blind:
        card = replace(CARD, name="blind")

    with pytest.raises(ConfigError, match="embeddings of the generalist blind are not feature maps"):
        ColdStarter(Blind(), EmbeddingStore(tmp_path, 0), _plan(), cold_start_of(policy_of(_plan())))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no pseudo_labels\.cold_start section"):
        cold_start_of(policy_of(tiny_plan()))


def test_models_that_declare_feature_maps_have_them() -> None:
    from semisam_core.generalists.lite_medsam import LiteMedSAM
    from semisam_core.generalists.registry import generalist_names, generalist_spec

    able = {name for name in generalist_names() if generalist_spec(name).card.feature_maps}
    assert able == {"fake", "lite-medsam", "medsam", "sam"}
    model = LiteMedSAM(torch.nn.Identity(), "0" * 64, torch.device("cpu"), 1)
    assert isinstance(model, FeatureMaps)
    assert model.framing.side == 256
    assert model.feature_map(torch.zeros(256, 64, 64)).shape == (256, 64, 64)
