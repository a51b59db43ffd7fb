"""Sites that annotate only some classes: an unlabeled voxel is background or one of the other classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from semisam_core.data.scans import keep_classes
from semisam_core.generalists import EmbeddingStore
from semisam_core.inference import new_specialist
from semisam_core.losses import merge_rest, supervised_loss
from semisam_core.pseudo_labels.calibration import Calibration, LabeledExample, calibrate
from semisam_core.regularizers import TrainingStep
from tests.conftest import balls, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist
from tests.semisam_core.pseudo_labels.test_calibration import Vague
from tests.semisam_core.regularizers.steps import built, noise, step_of

CLASSES = 3
THREE = "task.classes=[{name: a, value: 1}, {name: b, value: 2}, {name: c, value: 3}]"
SOME = st.sets(st.integers(1, CLASSES), min_size=1).map(lambda chosen: tuple(sorted(chosen)))


def _patches(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((2, 1 + CLASSES, 4, 4, 3), generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 1 + CLASSES, (2, 4, 4, 3), generator=generator)


def _obvious(logits: Tensor, label: Tensor, annotated: tuple[int, ...]) -> float:
    """The marginal loss as written in the paper: merge probabilities, then cross-entropy and Dice."""
    probability = logits.softmax(1)
    rest = 1 - probability[:, list(annotated)].sum(1)
    entropy = torch.zeros(label.shape, dtype=torch.float64)
    dice = []
    drawn = torch.zeros_like(label, dtype=torch.bool)
    for k in annotated:
        true = label == k
        drawn |= true
        entropy += torch.where(true, -probability[:, k].log(), 0)
        for p, y in zip(probability[:, k], true.double(), strict=True):
            dice.append(1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    entropy += torch.where(drawn, 0, -rest.log())
    return float(0.5 * (entropy.mean() + torch.stack(dice).mean()))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), annotated=SOME)
def test_the_marginal_loss_is_cross_entropy_and_dice_with_the_rest_merged(
    seed: int, annotated: tuple[int, ...]
) -> None:
    logits, label = _patches(seed)
    assert float(supervised_loss(logits, label, annotated)) == pytest.approx(_obvious(logits, label, annotated))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_with_every_class_annotated_it_equals_the_plain_loss_bit_by_bit(seed: int) -> None:
    logits, label = _patches(seed)
    assert torch.equal(supervised_loss(logits, label, (1, 2, 3)), supervised_loss(logits, label))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), annotated=SOME)
def test_labels_of_classes_that_are_not_annotated_are_ignored(seed: int, annotated: tuple[int, ...]) -> None:
    logits, label = _patches(seed)
    erased = keep_classes(label, annotated)
    assert set(erased.unique().tolist()) <= {0, *annotated}
    assert torch.equal(supervised_loss(logits, label, annotated), supervised_loss(logits, erased, annotated))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), annotated=SOME.filter(lambda chosen: len(chosen) < CLASSES))
def test_the_loss_prefers_no_class_of_the_rest(seed: int, annotated: tuple[int, ...]) -> None:
    """The gradient on the rest's logits is proportional to their probabilities."""
    logits, label = _patches(seed)
    logits.requires_grad_(True)
    supervised_loss(logits, label, annotated).backward()
    assert logits.grad is not None
    rest = [k for k in range(1 + CLASSES) if k not in annotated]
    share = logits.detach()[:, rest].softmax(1)
    gradient = logits.grad[:, rest]
    assert torch.allclose(gradient, share * gradient.sum(1, keepdim=True), atol=1e-12)


def test_segmenting_a_class_that_is_not_annotated_has_no_loss_and_no_gradient() -> None:
    truth = torch.from_numpy(balls()[1]).long()[None]
    seen = 30.0 * functional.one_hot(truth, 1 + CLASSES).movedim(-1, 1).float()
    seen.requires_grad_(True)
    drawn = keep_classes(truth, (1,))
    loss = supervised_loss(seen, drawn, (1,))
    loss.backward()
    assert float(loss.detach()) < 1e-3
    assert seen.grad is not None
    assert float(seen.grad.abs().max()) < 1e-6
    assert float(supervised_loss(seen.detach(), drawn)) > 0.5  # wrong if the rest were background


def test_confusing_an_annotated_class_with_the_rest_has_a_loss() -> None:
    truth = torch.from_numpy(balls()[1]).long()[None]
    swapped = torch.tensor([0, 2, 1, 3])[truth]
    wrong = 30.0 * functional.one_hot(swapped, 1 + CLASSES).movedim(-1, 1).float()
    assert float(supervised_loss(wrong, keep_classes(truth, (1,)), (1,))) > 0.5


@pytest.mark.parametrize("annotated", [(), (0, 1), (4,)])
def test_annotated_classes_outside_the_plan_are_refused(annotated: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"annotated classes must be some of 1\.\.3, found"):
        supervised_loss(*_patches(0), annotated)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), annotated=SOME)
def test_merged_probabilities_keep_annotated_classes_and_sum_to_one(seed: int, annotated: tuple[int, ...]) -> None:
    probability = _patches(seed)[0].softmax(1)
    merged = merge_rest(probability, annotated)
    assert torch.allclose(merged.sum(1), torch.ones(()).double())
    for k in range(1, 1 + CLASSES):
        assert torch.equal(merged[:, k], probability[:, k] if k in annotated else torch.zeros_like(probability[:, k]))


def _three_class_step(annotated: tuple[int, ...] | None) -> TrainingStep:
    step = step_of(new_specialist(tiny_plan(THREE)), classes=3)
    assert step.labeled is not None
    label = (noise(2, 16, 16, 8, seed=5) > 0).to(torch.uint8)  # background and class 1
    return replace(step, labeled=replace(step.labeled, label=label, annotated=annotated))


def test_the_second_network_of_cross_pseudo_supervision_learns_by_the_marginal_loss_too() -> None:
    losses = {}
    for annotated in (None, (1,)):
        regularizer, step = built("cps", THREE), _three_class_step(annotated)
        assert regularizer.auxiliary is not None
        assert step.labeled is not None
        answer = regularizer.auxiliary.networks["second"](step.labeled.image)
        loss = regularizer.losses(step).auxiliary
        assert loss is not None
        losses[annotated] = (
            float(loss.detach()),
            float(supervised_loss(answer.detach(), step.labeled.label, annotated)),
        )
    (plain, plain_supervised), (marginal, marginal_supervised) = losses[None], losses[(1,)]
    assert marginal_supervised < plain_supervised
    assert plain - marginal == pytest.approx(plain_supervised - marginal_supervised, rel=1e-4)


def test_the_discriminator_does_not_see_classes_that_are_not_annotated() -> None:
    regularizer, step = built("dan", THREE), _three_class_step((1,))
    assert step.labeled is not None
    image, seen = step.unlabeled.image, []
    assert regularizer.auxiliary is not None
    regularizer.auxiliary.networks["discriminator"].register_forward_hook(lambda _, given, __: seen.append(given))
    regularizer.losses(step)
    assert len(seen) == 3
    assert any(torch.equal(each[0], image) for each in seen)
    assert all(not bool(probability[:, 2:].any()) for _, probability in seen)


def test_calibration_uses_annotated_classes_only(tmp_path: Path) -> None:
    image, label = (torch.from_numpy(each) for each in balls())
    volume = ((image - image.mean()) / image.std())[None]
    teacher = functional.one_hot(label.long(), 4).movedim(-1, 0).float()
    models, plan = [FakeGeneralist(), Vague()], tiny_plan(THREE)

    def calibration(drawn: Tensor, name: str, annotated: tuple[int, ...] | None) -> Calibration:
        example = LabeledExample(volume, drawn, lambda: teacher)
        return calibrate([example], models, EmbeddingStore(tmp_path / name, 10**9), plan, annotated)

    whole, partial = calibration(label, "a", (1,)), calibration(keep_classes(label, (1,)), "b", (1,))
    assert whole == partial
    assert partial.volumes_ml == (((label == 1).sum().item() * 8 / 1000,), (), ())
    misled = calibration(keep_classes(label, (1,)), "c", None)
    assert misled.trust["fake"] < partial.trust["fake"]
