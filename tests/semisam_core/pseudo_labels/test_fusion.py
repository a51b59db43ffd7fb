"""From generalists' answers to pseudo-labels: fused, uncertain where they differ, gated, never guessed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.generalists import EmbeddingStore, Prompts, Segmentation, VolumeGrid
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import (
    Calibration,
    PseudoLabel,
    confidence_fused,
    make_pseudo_label,
    settle_overlaps,
)
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.conftest import blob, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist

TWO_CLASSES = "task.classes=[{name: first, value: 1}, {name: second, value: 2}]"


def _scan(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a normalised scan (1, H, W, D) and its foreground (H, W, D)."""
    image, label = blob(seed=seed)
    volume = torch.from_numpy(image)[None]
    return (volume - volume.mean()) / volume.std(), torch.from_numpy(label).float()


def _teacher(*foreground: Tensor) -> Tensor:
    stacked = torch.stack(foreground)
    return torch.cat([1 - stacked.amax(0, keepdim=True), stacked])


def _ask(
    folder: Path,
    plan: Plan,
    image: Tensor,
    teacher: Tensor,
    *models: FakeGeneralist,
    store: EmbeddingStore | None = None,
    calibration: Calibration | None = None,
) -> PseudoLabel:
    store = store or EmbeddingStore(folder / "embeddings", 10**9)
    return make_pseudo_label(image, teacher, models or (FakeGeneralist(),), store, plan, calibration)


def test_a_pseudo_label_is_the_generalists_foreground_of_the_prompted_class(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    label = _ask(tmp_path, plan, image, _teacher(truth))
    assert label.target.shape == label.uncertainty.shape == (1, *truth.shape)
    assert label.valid.tolist() == [True]
    answered = label.generalist[0] > 0.5
    assert 2 * float((answered * truth).sum()) / float(answered.sum() + truth.sum()) > 0.9


def test_the_background_channel_never_prompts(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    model = FakeGeneralist()
    _ask(tmp_path, plan, image, _teacher(truth), model)
    rows = truth.any(2).any(1).nonzero()
    for prompts in model.prompts[:1]:
        for box in prompts.boxes:
            assert int(rows.min()) - 2 <= box.bounds[0]
            assert box.bounds[2] <= int(rows.max()) + 2


def test_an_empty_prediction_gets_no_prompt_no_pseudo_label_and_is_counted(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    model = FakeGeneralist()
    label = _ask(tmp_path, plan, image, _teacher(torch.zeros_like(truth)), model)
    assert label.refusals == (Refusal.EMPTY,)
    assert not label.valid.any()
    assert model.embedded == []
    assert float(label.target.abs().sum()) == 0.0


def test_a_scan_is_encoded_once_however_often_its_prompts_change(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    model = FakeGeneralist()
    store = EmbeddingStore(tmp_path / "embeddings", 10**9)
    for shift in (0, 1, 2, 0):
        _ask(tmp_path, plan, image, _teacher(truth.roll(shift, 0)), model, store=store)
    assert len(model.embedded) == len(set(model.embedded))


def test_prompts_and_answer_follow_the_teacher(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    first, moved = FakeGeneralist(), FakeGeneralist()
    near = _ask(tmp_path, plan, image, _teacher(truth), first)
    far = _ask(tmp_path, plan, image, _teacher(truth.roll(6, 0)), moved)
    assert first.prompts[0] != moved.prompts[0]
    assert not torch.equal(near.generalist, far.generalist)


def test_a_generalist_that_agrees_with_the_specialist_is_no_error(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    once = _ask(tmp_path, plan, image, _teacher(truth))
    again = _ask(tmp_path, plan, image, _teacher((once.generalist[0] > 0.5).float()))
    assert again.valid.all()


def test_the_order_of_scans_changes_nothing(tmp_path: Path, plan: Plan) -> None:
    model = FakeGeneralist()
    scans = [_scan(seed) for seed in range(3)]
    forwards = [_ask(tmp_path, plan, image, _teacher(truth), model) for image, truth in scans]
    backwards = [_ask(tmp_path, plan, image, _teacher(truth), model) for image, truth in reversed(scans)]
    for one, other in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.uncertainty, other.uncertainty)


def test_making_a_pseudo_label_takes_no_expert_label() -> None:
    assert "label" not in inspect.signature(make_pseudo_label).parameters


def test_where_prompt_sets_disagree_the_pseudo_label_is_uncertain(plan: Plan) -> None:
    policy = plan.pseudo_labels
    assert policy is not None
    teacher = torch.zeros(2, 2, 1)
    mean, variance = torch.zeros(2, 2, 1), torch.zeros(2, 2, 1)
    mean[0, 0, 0], variance[0, 0, 0] = 0.5, 0.25  # one prompt set says 1, the other 0
    _, uncertainty = confidence_fused(teacher, mean, variance, 1.0, policy)
    expected = policy.uncertainty.prompts * 0.25 + policy.uncertainty.specialist * 0.25
    assert float(uncertainty[0, 0, 0]) == pytest.approx(expected)
    assert float(uncertainty[1, 1, 0]) == 0.0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), agreement=st.floats(0, 1))
def test_fused_targets_lie_between_teacher_and_generalist_and_uncertainty_stays_positive(
    seed: int, agreement: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy = tiny_plan().pseudo_labels
    assert policy is not None
    teacher, mean, variance = (torch.rand((3, 3, 2), generator=generator) for _ in range(3))
    target, uncertainty = confidence_fused(teacher, mean, variance, agreement, policy)
    low, high = torch.minimum(teacher, mean), torch.maximum(teacher, mean)
    assert bool(((target >= low - 1e-6) & (target <= high + 1e-6)).all())
    assert bool(((target >= 0) & (target <= 1)).all())
    assert bool((uncertainty >= 0).all())


def test_the_less_teacher_and_generalist_agree_the_more_the_generalist_counts() -> None:
    policy = tiny_plan("pseudo_labels.generalist_share=0.5", "pseudo_labels.share_gain=0.25").pseudo_labels
    assert policy is not None
    teacher, mean, nothing = torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    targets = [float(confidence_fused(teacher, mean, nothing, agreement, policy)[0]) for agreement in (1.0, 0.6, 0.0)]
    assert targets == pytest.approx([0.5, 0.6, 0.75])


def test_several_generalists_are_averaged_and_one_that_fails_is_left_out(tmp_path: Path, plan: Plan) -> None:
    class Broken(FakeGeneralist):
        def segment(self, *_: object) -> Segmentation:
            raise RuntimeError("out of memory")

    image, truth = _scan()
    alone = _ask(tmp_path, plan, image, _teacher(truth))
    beside = _ask(tmp_path, plan, image, _teacher(truth), Broken("1" * 64), FakeGeneralist())
    assert torch.equal(alone.target, beside.target)
    assert _ask(tmp_path, plan, image, _teacher(truth), Broken()).refusals == (Refusal.FAILED,)


def test_an_answer_that_has_left_its_prompt_is_gated(tmp_path: Path) -> None:
    class Elsewhere(FakeGeneralist):
        def segment(self, embeddings: object, prompts: Prompts, grid: VolumeGrid) -> Segmentation:
            probability = torch.zeros(grid.shape)
            probability[:4, :4] = 1.0
            return Segmentation(probability, {0: 0.2})

    image, truth = _scan()
    strict = tiny_plan("pseudo_labels.gates.minimum_agreement=0.5")
    assert _ask(tmp_path, strict, image, _teacher(truth), Elsewhere()).refusals == (Refusal.DISAGREEMENT,)
    choosy = tiny_plan("pseudo_labels.gates.minimum_quality=0.5")
    assert _ask(tmp_path, choosy, image, _teacher(truth), Elsewhere()).refusals == (Refusal.LOW_QUALITY,)


def test_an_answer_of_which_too_little_is_certain_is_gated(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    sure = _ask(tmp_path, plan, image, _teacher(truth)).confidences()[0]
    for minimum, refusal in ((sure - 0.01, None), (sure + 0.01, Refusal.LOW_CONFIDENCE)):
        choosy = tiny_plan(f"pseudo_labels.gates.minimum_confidence={minimum}")
        assert _ask(tmp_path, choosy, image, _teacher(truth)).refusals == (refusal,)


def test_a_volume_unlike_any_of_the_experts_masks_is_gated(tmp_path: Path) -> None:
    image, truth = _scan()
    plan = tiny_plan("pseudo_labels.gates.volume_factor=1.5")
    volume_ml = float(truth.sum()) * 8 / 1000
    for times, refusal in ((1.0, None), (4.0, Refusal.IMPLAUSIBLE), (0.25, Refusal.IMPLAUSIBLE)):
        calibration = Calibration(volumes_ml=((volume_ml * times,),))
        assert _ask(tmp_path, plan, image, _teacher(truth), calibration=calibration).refusals == (refusal,)
    assert _ask(tmp_path, plan, image, _teacher(truth)).refusals == (None,)


def test_islands_of_an_answer_that_hang_on_nothing_in_3d_are_no_foreground(tmp_path: Path, plan: Plan) -> None:
    class Islands(FakeGeneralist):
        def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
            answer = super().segment(embeddings, prompts, grid)
            answer.probability[0:2, 0:2, 0:3] = 0.9
            return answer

    image, truth = _scan()
    label = _ask(tmp_path, plan, image, _teacher(truth), Islands())
    assert label.valid.all()
    assert not bool((label.generalist[0, 0:2, 0:2] > 0.5).any())
    assert bool((label.generalist[0] > 0.5).any())


def test_a_generalist_that_earned_more_trust_counts_more(tmp_path: Path, plan: Plan) -> None:
    class Timid(FakeGeneralist):
        def __init__(self) -> None:
            super().__init__("1" * 64)
            self.card = replace(self.card, name="timid")

        def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
            answer = super().segment(embeddings, prompts, grid)
            return Segmentation(answer.probability * 0.4, answer.quality)

    image, truth = _scan()
    models = (FakeGeneralist(), Timid())
    alone = _ask(tmp_path, plan, image, _teacher(truth)).generalist
    trusted = _ask(
        tmp_path, plan, image, _teacher(truth), *models, calibration=Calibration({"fake": 9.0, "timid": 1.0})
    )
    assert torch.allclose(trusted.generalist, alone * (0.9 + 0.1 * 0.4), atol=1e-5)


def test_each_class_is_prompted_and_gated_by_itself(tmp_path: Path) -> None:
    image, truth = _scan()
    label = _ask(tmp_path, tiny_plan(TWO_CLASSES), image, _teacher(truth, torch.zeros_like(truth)))
    assert label.refusals == (None, Refusal.EMPTY)
    assert label.valid.tolist() == [True, False]
    assert float(label.target[0].sum()) > 0
    assert float(label.target[1].sum()) == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_overlaps_go_to_the_higher_probability(seed: int) -> None:
    probability = torch.rand((3, 4, 4, 2), generator=torch.Generator().manual_seed(seed))
    settled = settle_overlaps(probability)
    assert int((settled > 0.5).sum(0).max()) <= 1
    winner = probability.argmax(0, keepdim=True)
    assert torch.equal(settled.gather(0, winner), probability.gather(0, winner))
    uncontested = (probability > 0.5).sum(0) <= 1
    assert torch.equal(settled[:, uncontested], probability[:, uncontested])


def test_the_store_gives_back_what_was_saved_to_half_precision(tmp_path: Path) -> None:
    image, truth = _scan()
    label = _ask(tmp_path, tiny_plan(TWO_CLASSES), image, _teacher(truth, torch.zeros_like(truth)))
    store = PseudoLabelStore(tmp_path / "kept")
    store.save("a" * 64, label)
    kept = store.load("a" * 64)
    assert kept is not None
    assert kept.refusals == label.refusals
    assert torch.equal(kept.valid, label.valid)
    assert torch.allclose(kept.target, label.target, atol=1e-3)
    assert torch.allclose(kept.uncertainty, label.uncertainty, atol=1e-2)


def test_a_damaged_pseudo_label_counts_as_absent(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path)
    (tmp_path / f"{'a' * 64}.safetensors").write_bytes(b"torn")
    assert store.load("a" * 64) is None
    assert store.load("b" * 64) is None


def _with_uncertainty(uncertainty: Tensor, target: Tensor, *valid: bool) -> PseudoLabel:
    refusals = tuple(None if accepted else Refusal.EMPTY for accepted in valid)
    return PseudoLabel(target, uncertainty, torch.tensor(valid), refusals, target)


def test_confidence_is_the_mean_weight_within_the_target_of_each_accepted_class() -> None:
    target, uncertainty = torch.zeros(3, 4, 4, 4), torch.full((3, 4, 4, 4), 9.0)
    target[0, :2], uncertainty[0, 0], uncertainty[0, 1] = 0.9, 0.0, 1.0
    target[2, 3], uncertainty[2, 3] = 0.6, 2.0
    confidences = _with_uncertainty(uncertainty, target, True, False, True).confidences()
    assert confidences == pytest.approx([(1 + math.exp(-1)) / 2, math.exp(-2)])


def test_a_target_without_foreground_vouches_for_nothing() -> None:
    blank = torch.zeros(1, 4, 4, 4)
    assert _with_uncertainty(blank, blank + 0.5, True).confidences() == [0.0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1e-8, 0.1, 1.0, 1e6]))
def test_confidence_lies_between_zero_and_one(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, uncertainty = (torch.rand(2, 5, 5, 5, generator=generator) for _ in range(2))
    assert all(0 <= each <= 1 for each in _with_uncertainty(scale * uncertainty, target, True, True).confidences())


def test_a_kept_pseudo_label_keeps_its_confidence(tmp_path: Path, plan: Plan) -> None:
    image, truth = _scan()
    made = _ask(tmp_path, plan, image, _teacher(truth))
    store = PseudoLabelStore(tmp_path / "labels")
    store.save("scan", made)
    kept = store.load("scan")
    assert kept is not None
    assert 0 < made.confidences()[0] < 1
    assert kept.confidences() == pytest.approx(made.confidences(), abs=1e-2)
