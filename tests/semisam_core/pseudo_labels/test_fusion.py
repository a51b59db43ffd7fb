"""From generalists' answers to pseudo-labels: fused, uncertain where answers differ, gated class by class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists import EmbeddingStore, Prompts, Segmentation, VolumeGrid
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.pseudo_labels.fusion import (
    PseudoLabel,
    fuse_with_teacher,
    make_pseudo_label,
    settle_overlaps,
)
from tests.conftest import blob, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist
from tests.semisam_core.pseudo_labels.scenes import (
    FIRST,
    SECOND,
    SHAPE,
    TWO_CLASSES,
    Broken,
    Scaled,
    cuboid,
    image_of,
    plain_plan,
    pseudo_label,
    teacher_of,
)

TARGET = cuboid(SECOND)
IMAGE, TEACHER = image_of(TARGET), teacher_of(TARGET)


def _coarser(maps: Tensor) -> Tensor:
    """Bring maps (K, H, W, D) to voxels of twice the size."""
    return F.avg_pool3d(maps[None], 2)[0]


def _noisy(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a normalised noisy scan (1, H, W, D) and its foreground (H, W, D)."""
    image, label = blob(seed=seed)
    volume = torch.from_numpy(image)[None]
    return (volume - volume.mean()) / volume.std(), torch.from_numpy(label).float()


def test_a_pseudo_label_is_the_generalists_foreground_of_the_prompted_class(tmp_path: Path) -> None:
    label = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER)
    assert label.target.shape == label.uncertainty.shape == (1, *SHAPE)
    assert label.valid.tolist() == [True]
    assert torch.equal(label.generalist[0] > 0.5, TARGET > 0)


def test_the_background_channel_never_prompts(tmp_path: Path) -> None:
    model = FakeGeneralist()
    pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER, model)
    assert model.prompts
    assert {box.bounds for prompts in model.prompts for box in prompts.boxes} == {(13, 9, 21, 17)}


def test_without_a_prediction_no_generalist_is_prompted_and_the_class_is_refused(tmp_path: Path) -> None:
    model = FakeGeneralist()
    label = pseudo_label(tmp_path, plain_plan(), IMAGE, teacher_of(0 * TARGET), model)
    assert label.refusals == (Refusal.EMPTY,)
    assert not label.valid.any()
    assert model.embedded == []
    assert not label.target.any()


def test_a_scan_is_encoded_once_however_often_its_prompts_change(tmp_path: Path) -> None:
    model = FakeGeneralist()
    for shift in (0, 1, 2, 0):
        pseudo_label(tmp_path, plain_plan(), IMAGE, teacher_of(TARGET.roll(-shift, 0)), model)
    assert len(model.embedded) == len(set(model.embedded))


def test_prompts_and_answer_follow_the_teacher(tmp_path: Path) -> None:
    first, moved = FakeGeneralist(), FakeGeneralist()
    near = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER, first)
    far = pseudo_label(tmp_path, plain_plan(), IMAGE, teacher_of(TARGET.roll(-6, 0)), moved)
    assert first.prompts[0] != moved.prompts[0]
    assert not torch.equal(near.generalist, far.generalist)


def test_a_generalist_that_agrees_with_the_specialist_is_no_error(tmp_path: Path) -> None:
    once = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER)
    again = pseudo_label(tmp_path, plain_plan(), IMAGE, teacher_of((once.generalist[0] > 0.5).float()))
    assert again.valid.all()


def test_the_order_of_scans_changes_nothing(tmp_path: Path) -> None:
    model, plan = FakeGeneralist(), tiny_plan()
    scans = [_noisy(seed) for seed in range(3)]
    forwards = [pseudo_label(tmp_path, plan, image, teacher_of(truth), model) for image, truth in scans]
    backwards = [pseudo_label(tmp_path, plan, image, teacher_of(truth), model) for image, truth in reversed(scans)]
    for one, other in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.uncertainty, other.uncertainty)


def test_making_a_pseudo_label_takes_no_expert_label() -> None:
    assert "label" not in inspect.signature(make_pseudo_label).parameters


def test_each_class_is_fused_with_and_judged_against_its_own_teacher_channel(tmp_path: Path) -> None:
    first, second = 0.9 * cuboid(FIRST), 0.7 * cuboid(SECOND)
    plan = plain_plan(TWO_CLASSES, "pseudo_labels.share_gain=0.0", "pseudo_labels.generalist_share=0.25")
    label = pseudo_label(tmp_path, plan, image_of(cuboid(FIRST, SECOND)), teacher_of(first, second))
    policy = plan.pseudo_labels
    assert policy is not None
    assert label.valid.tolist() == [True, True]
    for k, teacher in enumerate((first, second)):  # a single plane and prompt set: no variance
        apart = (teacher - label.generalist[k]) ** 2
        assert torch.allclose(label.uncertainty[k], policy.uncertainty.specialist * apart, atol=1e-6)
        assert torch.allclose(label.target[k], 0.25 * label.generalist[k] + 0.75 * teacher, atol=1e-6)


def test_each_class_is_prompted_and_gated_separately(tmp_path: Path) -> None:
    first = cuboid(FIRST)
    label = pseudo_label(tmp_path, plain_plan(TWO_CLASSES), image_of(first), teacher_of(first, 0 * first))
    assert label.refusals == (None, Refusal.EMPTY)
    assert label.valid.tolist() == [True, False]
    assert float(label.target[0].sum()) > 0
    assert float(label.target[1].sum()) == 0


def test_a_pseudo_label_moves_to_another_grid_with_its_uncertainty(tmp_path: Path) -> None:
    plan = plain_plan(TWO_CLASSES)
    teacher = teacher_of(0.9 * cuboid(FIRST), 0.7 * cuboid(SECOND))
    label = pseudo_label(tmp_path, plan, image_of(cuboid(FIRST, SECOND)), teacher)
    moved = label.moved(_coarser)
    for name in ("target", "uncertainty", "generalist"):
        assert getattr(moved, name).shape == (2, 12, 10, 7)
        assert bool(getattr(moved, name).any())
        assert torch.equal(getattr(moved, name), _coarser(getattr(label, name)))
    assert not torch.equal(moved.uncertainty, moved.target)
    assert moved.refusals == label.refusals
    assert torch.equal(moved.valid, label.valid)


def test_uncertainty_weighs_the_variance_over_prompts_and_the_distance_from_the_teacher() -> None:
    policy = tiny_plan("pseudo_labels.uncertainty={prompts: 20.0, specialist: 4.0}").pseudo_labels
    assert policy is not None
    teacher, mean, variance = (torch.zeros(2, 2, 1) for _ in range(3))
    mean[0, 0, 0], variance[0, 0, 0] = 0.5, 0.25  # one prompt set says 1, the other 0
    variance[0, 1, 0], mean[1, 0, 0] = 0.1, 1.0
    _, uncertainty = fuse_with_teacher(teacher, mean, variance, 1.0, policy)
    assert uncertainty.flatten().tolist() == pytest.approx([20 * 0.25 + 4 * 0.25, 2.0, 4.0, 0.0])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), agreement=st.floats(0, 1))
def test_fused_targets_lie_between_teacher_and_generalist_and_uncertainty_is_not_negative(
    seed: int, agreement: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy = tiny_plan().pseudo_labels
    assert policy is not None
    teacher, mean, variance = (torch.rand((3, 3, 2), generator=generator) for _ in range(3))
    target, uncertainty = fuse_with_teacher(teacher, mean, variance, agreement, policy)
    low, high = torch.minimum(teacher, mean), torch.maximum(teacher, mean)
    assert bool(((target >= low - 1e-6) & (target <= high + 1e-6)).all())
    assert bool(((target >= 0) & (target <= 1)).all())
    assert bool((uncertainty >= 0).all())


def test_the_less_teacher_and_generalist_agree_the_more_the_generalist_counts() -> None:
    policy = tiny_plan("pseudo_labels.generalist_share=0.5", "pseudo_labels.share_gain=0.25").pseudo_labels
    assert policy is not None
    teacher, mean, nothing = torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    targets = [float(fuse_with_teacher(teacher, mean, nothing, agreement, policy)[0]) for agreement in (1.0, 0.6, 0.0)]
    assert targets == pytest.approx([0.5, 0.6, 0.75])


def test_a_plan_may_take_the_generalists_answer_alone(tmp_path: Path) -> None:
    teacher = teacher_of(0.7 * TARGET)
    label = pseudo_label(tmp_path, plain_plan("pseudo_labels.target=generalist"), IMAGE, teacher)
    assert torch.equal(label.target, label.generalist)
    assert bool((label.uncertainty > 0).any())


def test_several_generalists_are_averaged_and_a_broken_one_is_left_out(tmp_path: Path) -> None:
    alone = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER)
    beside = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER, Broken(), FakeGeneralist())
    assert torch.equal(alone.target, beside.target)
    both = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER, FakeGeneralist(), Scaled("timid", 0.6))
    assert torch.allclose(both.generalist, 0.8 * alone.generalist, atol=1e-6)
    assert pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER, Broken()).refusals == (Refusal.FAILED,)


def test_a_trusted_generalist_counts_more_in_the_target_and_in_the_variance(tmp_path: Path) -> None:
    models = FakeGeneralist(), Scaled("timid", 0.6)
    alone = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER).generalist
    calibration = Calibration({"fake": 9.0, "timid": 1.0})
    plan = plain_plan("pseudo_labels.uncertainty={prompts: 1.0, specialist: 0.0}")
    trusted = pseudo_label(tmp_path, plan, IMAGE, TEACHER, *models, calibration=calibration)
    assert torch.allclose(trusted.generalist, alone * (0.9 + 0.1 * 0.6), atol=1e-5)
    assert torch.allclose(trusted.uncertainty, 0.9 * 0.1 * (0.4 * alone) ** 2, atol=1e-6)


def test_low_quality_is_refused_and_trust_weights_the_quality(tmp_path: Path) -> None:
    models = FakeGeneralist(), Scaled("modest", 1.0, quality=0.1)  # 0.9 and 0.1
    plan = plain_plan("pseudo_labels.gates.minimum_quality=0.6")
    trusts: list[tuple[Calibration, Refusal | None]] = [
        (Calibration(), Refusal.LOW_QUALITY),
        (Calibration({"fake": 3.0, "modest": 1.0}), None),
        (Calibration({"fake": 1.0, "modest": 3.0}), Refusal.LOW_QUALITY),
    ]
    for calibration, refusal in trusts:
        label = pseudo_label(tmp_path, plan, IMAGE, TEACHER, *models, calibration=calibration)
        assert label.refusals == (refusal,)


def test_an_answer_away_from_its_prompt_is_refused(tmp_path: Path) -> None:
    class Elsewhere(FakeGeneralist):
        def segment(self, embeddings: object, prompts: Prompts, grid: VolumeGrid) -> Segmentation:
            probability = torch.zeros(grid.shape)
            probability[:4, :5] = 1.0
            return Segmentation(probability, {0: 0.2})

    strict = plain_plan("pseudo_labels.gates.minimum_agreement=0.5")
    assert pseudo_label(tmp_path, strict, IMAGE, TEACHER, Elsewhere()).refusals == (Refusal.DISAGREEMENT,)


@pytest.mark.parametrize(
    ("gate", "refusal"), [("maximum_volume_ml=6.0", Refusal.TOO_LARGE), ("minimum_volume_ml=3.0", Refusal.TOO_SMALL)]
)
def test_an_answer_of_implausible_volume_is_refused_though_its_prompt_was_accepted(
    tmp_path: Path, gate: str, refusal: Refusal
) -> None:
    class Wrong(FakeGeneralist):
        def segment(self, embeddings: object, prompts: Prompts, grid: VolumeGrid) -> Segmentation:
            probability = torch.zeros(grid.shape)
            probability[13:22, 9:18, 5:6] = 1.0  # 0.7 ml
            if refusal is Refusal.TOO_LARGE:
                probability[8:23, 5:19, 3:13] = 1.0  # 18.9 ml
            return Segmentation(probability, dict.fromkeys(range(5, 12), 0.9))

    plan = plain_plan(f"pseudo_labels.gates.{gate}")  # the prompt has 5.1 ml
    assert pseudo_label(tmp_path, plan, IMAGE, TEACHER).refusals == (None,)
    assert pseudo_label(tmp_path, plan, IMAGE, TEACHER, Wrong()).refusals == (refusal,)


def test_a_target_of_low_confidence_is_refused(tmp_path: Path) -> None:
    teacher = teacher_of(0.7 * TARGET)
    sure = pseudo_label(tmp_path, plain_plan(), IMAGE, teacher).confidences()[0]
    assert 0 < sure < 1
    for minimum, refusal in ((sure - 0.01, None), (sure + 0.01, Refusal.LOW_CONFIDENCE)):
        choosy = plain_plan(f"pseudo_labels.gates.minimum_confidence={minimum}")
        assert pseudo_label(tmp_path, choosy, IMAGE, teacher).refusals == (refusal,)


def test_a_volume_unlike_the_experts_masks_of_the_same_class_is_refused(tmp_path: Path) -> None:
    image, teacher = image_of(cuboid(FIRST, SECOND)), teacher_of(cuboid(FIRST), cuboid(SECOND))
    plan = plain_plan(TWO_CLASSES, "pseudo_labels.gates.volume_factor=1.5")
    first_ml, second_ml = (float(cuboid(box).sum()) * 9 / 1000 for box in (FIRST, SECOND))
    for times, refusal in ((1.0, None), (1.4, None), (1.6, Refusal.IMPLAUSIBLE), (0.6, Refusal.IMPLAUSIBLE)):
        calibration = Calibration(volumes_ml=((first_ml,), (second_ml * times,)))
        label = pseudo_label(tmp_path, plan, image, teacher, calibration=calibration)
        assert label.refusals == (None, refusal)
    assert pseudo_label(tmp_path, plan, image, teacher).refusals == (None, None)


def test_islands_of_an_answer_that_are_attached_to_nothing_in_3d_are_no_foreground(tmp_path: Path) -> None:
    class Islands(FakeGeneralist):
        def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
            answer = super().segment(embeddings, prompts, grid)
            answer.probability[0:2, 0:2, 0:3] = 0.9
            return answer

    label = pseudo_label(tmp_path, plain_plan(), IMAGE, TEACHER, Islands())
    assert label.valid.all()
    assert not bool((label.generalist[0, 0:2, 0:2] > 0.5).any())
    assert torch.equal(label.generalist[0] > 0.5, TARGET > 0)


def test_a_false_island_neither_prompts_nor_teaches_where_the_class_is_connected(tmp_path: Path) -> None:
    island = (slice(1, 8), slice(12, 19), slice(8, 13))
    classes = "task.classes=[{name: first, value: 1, connected: true}]"
    bright, seen = image_of(cuboid(SECOND, island)), teacher_of(cuboid(SECOND, island))
    single, several = FakeGeneralist(), FakeGeneralist()
    label = pseudo_label(tmp_path, plain_plan(classes), bright, seen, single)
    assert {box.bounds for prompts in single.prompts for box in prompts.boxes} == {(13, 9, 21, 17)}
    assert not bool(label.generalist[0][island].any())
    both = pseudo_label(tmp_path, plain_plan(), bright, seen, several)
    assert bool((both.generalist[0][island] > 0.5).all())


def test_prompting_by_connectedness_adds_nothing_to_a_plan() -> None:
    assert tiny_plan().hash == tiny_plan("task.classes=[{name: blob, value: 1, connected: false}]").hash
    assert "connected" not in tiny_plan().canonical_json()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_overlaps_go_to_the_higher_probability(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = torch.randint(0, 11, (3, 4, 4, 2), generator=generator) / 10  # some classes are equally sure
    settled = settle_overlaps(probability.clone())
    assert int((settled > 0.5).sum(0).max()) <= 1
    winner = probability.argmax(0, keepdim=True)
    assert torch.equal(settled.gather(0, winner), probability.gather(0, winner))
    uncontested = (probability > 0.5).sum(0) <= 1
    assert torch.equal(settled[:, uncontested], probability[:, uncontested])


def test_classes_of_one_scan_claim_no_voxel_twice(tmp_path: Path) -> None:
    wide = (slice(11, 24), slice(7, 20), slice(5, 12))
    teacher = teacher_of(0.8 * cuboid(wide), 0.9 * cuboid(SECOND))
    label = pseudo_label(tmp_path, plain_plan(TWO_CLASSES), image_of(cuboid(wide)), teacher)
    assert label.valid.all()
    assert int((label.target > 0.5).sum(0).max()) == 1
    assert int((label.generalist > 0.5).sum(0).max()) == 1


def _with_uncertainty(uncertainty: Tensor, target: Tensor, *valid: bool) -> PseudoLabel:
    refusals = tuple(None if accepted else Refusal.EMPTY for accepted in valid)
    return PseudoLabel(target, uncertainty, torch.tensor(valid), refusals, target)


def test_confidence_is_the_mean_weight_within_the_target_of_each_accepted_class() -> None:
    target, uncertainty = torch.zeros(3, 4, 4, 4), torch.full((3, 4, 4, 4), 9.0)
    target[0, :2], uncertainty[0, 0], uncertainty[0, 1] = 0.9, 0.0, 1.0
    target[2, 3], uncertainty[2, 3] = 0.6, 2.0
    confidences = _with_uncertainty(uncertainty, target, True, False, True).confidences()
    assert confidences == pytest.approx([(1 + math.exp(-1)) / 2, math.exp(-2)])


def test_a_target_without_foreground_has_no_confidence() -> None:
    blank = torch.zeros(1, 4, 4, 4)
    assert _with_uncertainty(blank, blank + 0.5, True).confidences() == [0.0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1e-8, 0.1, 1.0, 1e6]))
def test_confidence_lies_between_zero_and_one(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, uncertainty = (torch.rand(2, 5, 5, 5, generator=generator) for _ in range(2))
    assert all(0 <= each <= 1 for each in _with_uncertainty(scale * uncertainty, target, True, True).confidences())


def test_progress_counts_embedding_units(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = EmbeddingStore(tmp_path, 10**9)
    plan, models = plain_plan(), [FakeGeneralist()]
    make_pseudo_label(IMAGE, TEACHER, models, store, plan, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 7)
    assert seen[-1] == (7, 7)
