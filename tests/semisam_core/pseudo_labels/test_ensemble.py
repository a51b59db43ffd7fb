"""Every generalist is prompted in every plane, and its answers come back to the voxels they are about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists import EmbeddingStore, load_generalist
from semisam_core.plan_sections.pseudo_labels import PseudoLabels, Strategy
from semisam_core.prompting import Region
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble, GeneralistOutput, weighted_moments
from tests.semisam_core.generalists.fake import FakeGeneralist
from tests.semisam_core.pseudo_labels.scenes import (
    FIRST,
    SECOND,
    SHAPE,
    SPACING,
    Broken,
    Scaled,
    cuboid,
    image_of,
    plain_plan,
    store_in,
)

THREE_PLANES = "pseudo_labels.prompting.planes=[axial, coronal, sagittal]"
THREE_MARGINS = "pseudo_labels.prompting.margins_mm=[-1.0, 0.0, 2.0]"


def _policy(*assignments: str) -> PseudoLabels:
    policy = plain_plan(*assignments).pseudo_labels
    assert policy is not None
    return policy


def _ask(
    folder: Path, policy: PseudoLabels, *models: FakeGeneralist, target: Tensor | None = None, connected: bool = False
) -> dict[str, GeneralistOutput]:
    target = cuboid(SECOND) if target is None else target
    mask = target.numpy() > 0
    region = Region(mask, np.zeros_like(mask), SPACING, connected)
    ensemble = GeneralistEnsemble(image_of(target)[0], SPACING, models, store_in(folder), policy)
    return ensemble.ask(region, target)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_an_answer_from_any_plane_lies_where_the_target_is(tmp_path: Path, plane: str) -> None:
    policy = _policy(f"pseudo_labels.prompting.planes=[{plane}]")
    output = _ask(tmp_path, policy, FakeGeneralist())["fake"]
    assert torch.equal(output.maps[0] > 0.5, cuboid(SECOND) > 0)


def test_there_is_a_map_per_plane_and_prompt_set(tmp_path: Path) -> None:
    output = _ask(tmp_path, _policy(THREE_PLANES, THREE_MARGINS), FakeGeneralist())["fake"]
    assert [tuple(each.shape) for each in output.maps] == 9 * [SHAPE]


def test_margins_are_millimetres_in_every_plane(tmp_path: Path) -> None:
    model = FakeGeneralist()
    _ask(tmp_path, _policy(THREE_PLANES, "pseudo_labels.prompting.margins_mm=[3.0]"), model)
    axial, coronal, sagittal = (prompts.boxes[0].bounds for prompts in model.prompts)
    rows, columns, slices = (13 - 2, 21 + 2), (9 - 1.5, 17 + 1.5), (5 - 1, 11 + 1)  # of 1.5, 2 and 3 mm
    assert axial == (rows[0], columns[0], rows[1], columns[1])
    assert coronal == (rows[0], slices[0], rows[1], slices[1])
    assert sagittal == (columns[0], slices[0], columns[1], slices[1])


def test_each_plane_is_cut_at_the_plans_distance_in_millimetres(tmp_path: Path) -> None:
    model = FakeGeneralist()
    _ask(tmp_path, _policy(THREE_PLANES, "pseudo_labels.prompting.slice_step_mm=6.0"), model)
    indices = [[box.index for box in prompts.boxes] for prompts in model.prompts]
    assert indices == [[6, 8, 10], [9, 12, 15], [16, 20]]  # every 2nd, 3rd and 4th slice: 3, 2 and 1.5 mm


def test_prompt_sets_share_embeddings_and_planes_do_not(tmp_path: Path) -> None:
    axial, both = FakeGeneralist(), FakeGeneralist()
    _ask(tmp_path / "one", _policy(THREE_MARGINS), axial)
    _ask(tmp_path / "two", _policy(THREE_MARGINS, "pseudo_labels.prompting.planes=[axial, coronal]"), both)
    assert len(axial.embedded) == len(set(axial.embedded)) == 7
    assert len(both.embedded) == 7 + 9


def test_a_model_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    assert list(_ask(tmp_path, _policy(), Broken(), Scaled("other", 1.0))) == ["other"]


def test_skipped_slices_are_interpolated(tmp_path: Path) -> None:
    policy = _policy("pseudo_labels.prompting.slice_step_mm=6.0")
    output = _ask(tmp_path, policy, FakeGeneralist())["fake"]
    inside = output.maps[0][14, 10]
    assert torch.allclose(inside[6:11], torch.ones(5), atol=0.01)  # slices 6, 8 and 10 are prompted
    assert inside[5] == pytest.approx(0.5, abs=0.01)
    assert inside[11] == pytest.approx(0.5, abs=0.01)


def test_components_of_a_slice_are_answered_separately_and_united(tmp_path: Path) -> None:
    target = cuboid(FIRST, SECOND)  # both on slice 5
    model = FakeGeneralist()
    output = _ask(tmp_path, _policy(), model, target=target)["fake"]
    assert torch.equal(output.maps[0] > 0.5, target > 0)
    on_shared = {box.bounds for box in model.prompts[0].boxes if box.index == 5}
    assert on_shared == {(2, 3, 8, 7), (13, 9, 21, 17)}


def test_a_connected_class_is_answered_within_one_box_per_slice(tmp_path: Path) -> None:
    model = FakeGeneralist()
    _ask(tmp_path, _policy(), model, target=cuboid(FIRST, SECOND), connected=True)
    assert [box.bounds for box in model.prompts[0].boxes if box.index == 5] == [(2, 3, 21, 17)]


def test_litemedsam_finds_both_components_of_a_slice(tmp_path: Path) -> None:
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(72), indexing="ij")
    upper = ((rows - 26) / 15) ** 2 + ((columns - 40) / 12) ** 2 <= 1
    lower = ((rows - 72) / 14) ** 2 + ((columns - 26) / 16) ** 2 <= 1
    target = (upper | lower).float()[:, :, None]
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    mask = target.numpy() > 0
    policy = _policy("pseudo_labels.generalists=[lite-medsam]")
    model = load_generalist("lite-medsam", torch.device("cpu"))
    volume = 300 + 400 * target + 25 * noise
    ensemble = GeneralistEnsemble(volume, (1.0, 1.0, 3.0), [model], EmbeddingStore(tmp_path, 0), policy)
    answered = ensemble.ask(Region(mask, np.zeros_like(mask), (1.0, 1.0, 3.0)), target)["lite-medsam"].maps[0] > 0.5
    for part in (upper, lower):
        found = answered[:, :, 0] & part
        assert int(found.sum()) > 0.8 * int(part.sum())
    assert int((answered[:, :, 0] & ~(upper | lower)).sum()) < 0.2 * int(target.sum())


def test_the_quality_is_the_mean_over_planes_prompt_sets_and_slices(tmp_path: Path) -> None:
    outputs = _ask(tmp_path, _policy(THREE_PLANES), FakeGeneralist(), Scaled("modest", 1.0, quality=0.25))
    assert outputs["fake"].quality == pytest.approx(0.9)
    assert outputs["modest"].quality == pytest.approx(0.25)


def test_models_are_weighted_however_many_maps_each_has() -> None:
    sure = GeneralistOutput([torch.ones(1, 1, 1)] * 3, 0.9)
    unsure = GeneralistOutput([torch.zeros(1, 1, 1)], 0.9)
    for weight in (1.0, 4.0):
        mean, variance = weighted_moments({"a": sure, "b": unsure}, {"a": weight})
        share = weight / (weight + 1)
        assert float(mean) == pytest.approx(share)
        assert float(variance) == pytest.approx(share * (1 - share))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_models_with_equal_weights_and_map_counts_give_the_plain_mean_and_variance(
    seed: int, counts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand((counts[0], 2, 3, 2), generator=generator) for _ in counts]
    mean, variance = weighted_moments({str(k): GeneralistOutput(list(each), 1.0) for k, each in enumerate(maps)}, {})
    together = torch.cat(maps)
    assert torch.allclose(mean, together.mean(0), atol=1e-6)
    assert torch.allclose(variance, together.var(0, unbiased=False), atol=1e-6)


@pytest.mark.parametrize("strategy", [Strategy.BOXES, Strategy.UNCERTAINTY_RECTIFIED])
def test_a_plan_names_strategies_by_their_words(strategy: Strategy) -> None:
    assert _policy(f"pseudo_labels.prompting.strategy={strategy.value}").prompting.strategy is strategy
