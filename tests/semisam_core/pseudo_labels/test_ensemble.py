"""Generalists asked from every plane: answers come back to the voxels they are about, whatever way the scan was cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists import EmbeddingStore, Segmentation
from semisam_core.plan_sections.pseudo_labels import PseudoLabels, Strategy
from semisam_core.prompting import Region
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput, weighted_moments
from semisam_core.pseudo_labels.views import fill_between
from tests.conftest import blob, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist

SPACING = (2.0, 2.0, 2.0)


def _policy(*assignments: str) -> PseudoLabels:
    policy = tiny_plan("pseudo_labels.smooth_sigma_slices=0.0", *assignments).pseudo_labels
    assert policy is not None
    return policy


def _scene(seed: int = 0) -> tuple[Tensor, Region]:
    image, label = blob((24, 20, 16), seed)
    volume = torch.from_numpy(image)
    mask = label > 0
    return (volume - volume.mean()) / volume.std(), Region(mask, np.zeros_like(mask), SPACING)


def _consult(folder: Path, policy: PseudoLabels, *models: FakeGeneralist) -> dict[str, GeneralistOutput]:
    volume, region = _scene()
    store = EmbeddingStore(folder / "embeddings", 10**9)
    return GeneralistEnsemble(volume, SPACING, models, store, policy).ask(region, torch.from_numpy(region.mask).float())


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_an_answer_from_any_plane_lies_where_the_target_is(tmp_path: Path, plane: str) -> None:
    _, region = _scene()
    policy = _policy(f"pseudo_labels.prompting.planes=[{plane}]", "pseudo_labels.prompting.margins_mm=[0.0]")
    answered = (_consult(tmp_path, policy, FakeGeneralist())["fake"].maps[0] > 0.5).numpy()
    assert 2 * (answered & region.mask).sum() / (answered.sum() + region.mask.sum()) > 0.95


def test_each_plane_and_prompt_set_is_a_map(tmp_path: Path) -> None:
    policy = _policy("pseudo_labels.prompting.planes=[axial, coronal, sagittal]")
    output = _consult(tmp_path, policy, FakeGeneralist())["fake"]
    assert tuple(output.maps.shape) == (9, 24, 20, 16)


def test_prompt_sets_share_embeddings_and_planes_do_not(tmp_path: Path) -> None:
    axial, both = FakeGeneralist(), FakeGeneralist()
    _consult(tmp_path / "one", _policy(), axial)
    _consult(tmp_path / "two", _policy("pseudo_labels.prompting.planes=[axial, coronal]"), both)
    assert len(axial.embedded) == len(set(axial.embedded))
    assert len(both.embedded) > len(axial.embedded)


def test_a_model_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    class Broken(FakeGeneralist):
        def segment(self, *_: object) -> Segmentation:
            raise RuntimeError("out of memory")

    class Named(FakeGeneralist):
        def __init__(self) -> None:
            super().__init__("1" * 64)
            self.card = replace(self.card, name="other")

    assert list(_consult(tmp_path, _policy(), Broken(), Named())) == ["other"]


def test_leaving_slices_out_asks_about_fewer_and_changes_a_smooth_answer_little(tmp_path: Path) -> None:
    every, third = FakeGeneralist(), FakeGeneralist()
    full = _consult(tmp_path / "one", _policy(), every)["fake"].maps.mean(0) > 0.5
    policy = _policy("pseudo_labels.prompting.slice_step_mm=4.0")
    sparse = _consult(tmp_path / "two", policy, third)["fake"].maps.mean(0) > 0.5
    assert len(third.embedded) <= len(every.embedded) // 2 + 1
    assert 2 * int((full & sparse).sum()) / int(full.sum() + sparse.sum()) > 0.9


@settings(deadline=None, max_examples=30)
@given(step=st.integers(1, 5), seed=st.integers(0, 1000))
def test_between_answered_slices_probabilities_are_interpolated(step: int, seed: int) -> None:
    truth = torch.linspace(0, 1, 21).expand(2, 2, 21)  # linear along the slices, so that interpolation is exact
    answered = list(range(0, 21, step))
    sparse = torch.zeros(2, 2, 21)
    sparse[..., answered] = truth[..., answered]
    filled = fill_between(sparse, answered, step)
    assert torch.allclose(filled[..., : answered[-1] + 1], truth[..., : answered[-1] + 1], atol=1e-6)


def test_beyond_the_last_answered_slice_probabilities_fade() -> None:
    sparse = torch.zeros(1, 1, 12)
    sparse[..., 4] = 0.8
    assert fill_between(sparse, [4], 4)[0, 0].tolist() == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]
    )


def test_the_mean_over_models_is_weighted_by_trust_however_many_maps_each_gave() -> None:
    sure = GeneralistOutput(torch.ones(3, 1, 1, 1), 0.9)
    unsure = GeneralistOutput(torch.zeros(1, 1, 1, 1), 0.9)
    mean, variance = weighted_moments({"a": sure, "b": unsure}, {"a": 3.0, "b": 1.0})
    assert float(mean) == pytest.approx(0.75)
    assert float(variance) == pytest.approx(0.75 * 0.25)
    mean, _ = weighted_moments({"a": sure, "b": unsure}, {})
    assert float(mean) == pytest.approx(0.5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_without_trust_and_with_equal_counts_it_is_the_plain_mean_and_variance(seed: int, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand((counts[0], 2, 3, 2), generator=generator) for _ in counts]
    mean, variance = weighted_moments({str(k): GeneralistOutput(each, 1.0) for k, each in enumerate(maps)}, {})
    together = torch.cat(maps)
    assert torch.allclose(mean, together.mean(0), atol=1e-6)
    assert torch.allclose(variance, together.var(0, unbiased=False), atol=1e-6)


def test_every_strategy_is_known_to_the_plan_by_its_name() -> None:
    for strategy in (Strategy.BOXES, Strategy.UNCERTAINTY_RECTIFIED):
        assert _policy(f"pseudo_labels.prompting.strategy={strategy.value}").prompting.strategy is strategy
