"""The loss terms and their schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.losses import (
    confidence_aware_loss,
    confident_dice_loss,
    confident_entropy_loss,
    consistency_loss,
    consistency_weight,
    generalist_weight,
    supervised_loss,
    teacher_decay,
)

SHAPE = (2, 2, 4, 4, 3)  # (B, K, H, W, D)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _maps(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, target = (torch.rand(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, target, 5 * torch.rand(SHAPE, generator=generator, dtype=torch.float64)


def _obvious(student: torch.Tensor, target: torch.Tensor, uncertainty: torch.Tensor, valid: torch.Tensor) -> float:
    classes = []
    for k in range(SHAPE[1]):
        above = below = 0.0
        for b in range(SHAPE[0]):
            if valid[b, k]:
                for voxel in torch.cartesian_prod(*(torch.arange(side) for side in SHAPE[2:])).tolist():
                    place = (b, k, *voxel)
                    weight = math.exp(-float(uncertainty[place]))
                    above += weight * (float(student[place]) - float(target[place])) ** 2
                    below += weight
        if below:
            classes.append(above / below)
    return sum(classes) / len(classes) if classes else 0.0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), valid=st.lists(st.booleans(), min_size=4, max_size=4))
def test_the_confidence_aware_loss_is_the_papers_formula_class_by_class(seed: int, valid: list[bool]) -> None:
    flags = torch.tensor(valid).reshape(2, 2)
    loss = confidence_aware_loss(*_maps(seed), flags)
    assert float(loss) == pytest.approx(_obvious(*_maps(seed), flags), abs=1e-12)


def test_the_generalist_loss_has_a_gradient_wherever_student_and_pseudo_label_differ() -> None:
    student, target, uncertainty = _maps(0)
    student.requires_grad_(True)
    confidence_aware_loss(student, target, uncertainty, torch.ones(2, 2, dtype=torch.bool)).backward()
    assert student.grad is not None
    assert bool((student.grad != 0).all())


def test_the_gradient_moves_the_student_towards_the_pseudo_label() -> None:
    student, target, uncertainty = _maps(0)
    student.requires_grad_(True)
    confidence_aware_loss(student, target, uncertainty, torch.ones(2, 2, dtype=torch.bool)).backward()
    assert student.grad is not None
    assert bool((torch.sign(student.grad) == torch.sign(student.detach() - target)).all())


def test_uncertainty_weights_the_loss_voxel_by_voxel() -> None:
    student, target, uncertainty = _maps(0)
    valid = torch.ones(2, 2, dtype=torch.bool)
    flat = torch.full_like(uncertainty, uncertainty.mean().item())
    with_map = confidence_aware_loss(student, target, uncertainty, valid)
    with_number = confidence_aware_loss(student, target, flat, valid)
    assert float(with_map) != pytest.approx(float(with_number), rel=1e-6)
    assert float(with_number) == pytest.approx(float(((student - target) ** 2).mean()), rel=1e-9)


def test_an_uncertain_voxel_counts_less_than_a_certain_one() -> None:
    student, target = torch.zeros(1, 1, 1, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 1, 2)
    valid = torch.ones(1, 1, dtype=torch.bool)
    wrong_and_certain = torch.tensor([0.0, 3.0]).reshape(1, 1, 1, 1, 2)
    wrong_and_uncertain = torch.tensor([3.0, 0.0]).reshape(1, 1, 1, 1, 2)
    heavy = confidence_aware_loss(student, target, wrong_and_certain, valid)
    light = confidence_aware_loss(student, target, wrong_and_uncertain, valid)
    assert float(heavy) == pytest.approx(1 / (1 + math.exp(-3)))
    assert float(light) == pytest.approx(math.exp(-3) / (1 + math.exp(-3)))


def test_pseudo_label_and_uncertainty_get_no_gradient() -> None:
    student, target, uncertainty = (each.requires_grad_(True) for each in _maps(1))
    confidence_aware_loss(student, target, uncertainty, torch.ones(2, 2, dtype=torch.bool)).backward()
    assert target.grad is None
    assert uncertainty.grad is None


def test_a_refused_class_teaches_nothing() -> None:
    student, target, uncertainty = _maps(2)
    student.requires_grad_(True)
    valid = torch.tensor([[True, False], [False, False]])
    confidence_aware_loss(student, target, uncertainty, valid).backward()
    assert student.grad is not None
    assert float(student.grad[0, 1].abs().sum() + student.grad[1].abs().sum()) == 0.0
    assert float(student.grad[0, 0].abs().sum()) > 0.0


def test_without_a_valid_pseudo_label_loss_and_gradient_are_zero() -> None:
    student, target, uncertainty = _maps(3)
    student.requires_grad_(True)
    loss = confidence_aware_loss(student, target, uncertainty, torch.zeros(2, 2, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad is not None
    assert float(student.grad.abs().sum()) == 0.0


def test_the_order_of_a_batch_does_not_matter() -> None:
    student, target, uncertainty = _maps(4)
    valid = torch.tensor([[True, False], [True, True]])
    reversed_batch = [each.flip(0) for each in (student, target, uncertainty, valid)]
    assert float(confidence_aware_loss(student, target, uncertainty, valid)) == pytest.approx(
        float(confidence_aware_loss(*reversed_batch)), rel=1e-12
    )


LOUDER = (confident_entropy_loss, confident_dice_loss)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), valid=st.lists(st.booleans(), min_size=4, max_size=4))
def test_confident_entropy_and_dice_are_their_formulas_class_by_class(seed: int, valid: list[bool]) -> None:
    flags = torch.tensor(valid).reshape(2, 2)
    student, target, uncertainty = _maps(seed)
    entropies, dices = [], []
    for k in range(2):
        p, y, w = (each[flags[:, k], k].flatten() for each in (student, target, torch.exp(-uncertainty)))
        if len(p):
            entropies.append(float(-(w * (y * p.log() + (1 - y) * (1 - p).log())).sum() / w.sum()))
            dices.append(float(1 - (2 * (w * p * y).sum() + 1) / ((w * p).sum() + (w * y).sum() + 1)))
    for loss, parts in zip(LOUDER, (entropies, dices), strict=True):
        expected = sum(parts) / len(parts) if parts else 0.0
        assert float(loss(student, target, uncertainty, flags)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("loss", LOUDER)
def test_louder_losses_give_no_gradient_to_pseudo_labels_or_from_refused_ones(loss: Loss) -> None:
    student, target, uncertainty = (each.requires_grad_(True) for each in _maps(2))
    loss(student, target, uncertainty, torch.tensor([[True, False], [False, False]])).backward()
    assert target.grad is None
    assert uncertainty.grad is None
    assert student.grad is not None
    assert float(student.grad[0, 1].abs().sum() + student.grad[1].abs().sum()) == 0.0
    assert float(student.grad[0, 0].abs().sum()) > 0.0


def test_cross_entropy_is_louder_than_the_squared_error_where_the_student_is_sure_and_wrong() -> None:
    gradients = []
    for loss in (confidence_aware_loss, confident_entropy_loss):
        logit = torch.full((1, 1, 2, 2, 2), -5.0, requires_grad=True)
        ones = torch.ones(1, 1, 2, 2, 2)
        loss(logit.sigmoid(), ones, torch.zeros_like(ones), torch.ones(1, 1, dtype=torch.bool)).backward()
        assert logit.grad is not None
        gradients.append(float(logit.grad.norm()))
    assert gradients[1] > 50 * gradients[0]


def test_a_perfect_prediction_has_almost_no_supervised_loss() -> None:
    label = torch.randint(0, 3, (1, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    perfect = 40.0 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    assert float(supervised_loss(perfect, label)) < 1e-3
    assert float(supervised_loss(-perfect, label)) > 1.0


def test_consistency_is_the_mean_squared_difference_without_gradient_for_the_teacher() -> None:
    student, teacher, _ = _maps(5)
    student.requires_grad_(True)
    teacher.requires_grad_(True)
    loss = consistency_loss(student, teacher)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(((student - teacher) ** 2).mean().detach()))
    assert teacher.grad is None


def test_schedules_have_their_values_at_start_and_end() -> None:
    assert consistency_weight(0, 100, 0.1) == pytest.approx(0.1 * math.exp(-5))
    assert consistency_weight(100, 100, 0.1) == consistency_weight(500, 100, 0.1) == pytest.approx(0.1)
    assert consistency_weight(0, 0, 0.1) == 0.1
    assert generalist_weight(0, 100, 2.0, "decay") == 2.0
    assert generalist_weight(100, 100, 2.0, "decay") == pytest.approx(2.0 * math.exp(-5))
    assert generalist_weight(100, 100, 2.0, "constant") == 2.0
    assert generalist_weight(0, 100, 2.0, "ramp-up", 0.25) == pytest.approx(2.0 * math.exp(-5))
    assert generalist_weight(25, 100, 2.0, "ramp-up", 0.25) == generalist_weight(100, 100, 2.0, "ramp-up", 0.25) == 2.0
    assert [teacher_decay(t, 0.99) for t in (0, 1, 9_999)] == [0.0, 0.5, 0.99]


@settings(deadline=None, max_examples=50)
@given(first=st.integers(0, 1000), later=st.integers(0, 1000))
def test_lambda_c_rises_and_lambda_s_falls(first: int, later: int) -> None:
    first, later = sorted((first, later))
    assert consistency_weight(first, 500, 0.1) <= consistency_weight(later, 500, 0.1)
    assert generalist_weight(first, 1000, 1.0, "decay") >= generalist_weight(later, 1000, 1.0, "decay")
