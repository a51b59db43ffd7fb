"""One round of local training: what teaches, what moves, what repeats."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from semisam_core.contract import travelling
from semisam_core.data.patches import TrainingScan
from semisam_core.inference import new_specialist
from semisam_core.losses import proximal_loss
from semisam_core.plan import Plan
from semisam_core.training import (
    Loader,
    LocalRound,
    TrainingResult,
    learning_rate,
    new_teacher,
    train_round,
    update_teacher,
)
from tests.conftest import blob, tiny_plan

CPU = torch.device("cpu")


def _labeled(seed: int = 0) -> Loader:
    image, label = blob(seed=seed)
    return lambda: TrainingScan(torch.from_numpy(image)[None] / 50, torch.from_numpy(label))


def _unlabeled(seed: int = 1, pseudo_label: bool = False) -> Loader:
    image, label = blob(seed=seed)
    volume = torch.from_numpy(image)[None] / 50
    if not pseudo_label:
        return lambda: TrainingScan(volume)
    target = torch.from_numpy(label).float()[None]
    return lambda: TrainingScan(volume, None, target, torch.zeros_like(target), torch.tensor([True]))


def _round(
    plan: Plan, labeled: list[Loader], unlabeled: list[Loader], seed: int = 0, number: int = 1
) -> tuple[nn.Module, nn.Module, TrainingResult]:
    specialist = new_specialist(plan)
    teacher = new_teacher(specialist)
    local = LocalRound(plan, specialist, teacher, labeled, unlabeled, number, seed, CPU)
    return specialist, teacher, train_round(local)


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in network.state_dict().values()])


def test_the_same_seed_gives_the_same_weights_bit_by_bit(plan: Plan) -> None:
    first, _, _ = _round(plan, [_labeled()], [_unlabeled(pseudo_label=True)])
    second, _, _ = _round(plan, [_labeled()], [_unlabeled(pseudo_label=True)])
    assert torch.equal(_flat(first), _flat(second))


def test_another_seed_gives_other_weights(plan: Plan) -> None:
    first, _, _ = _round(plan, [_labeled()], [])
    second, _, _ = _round(plan, [_labeled()], [], seed=1)
    assert not torch.equal(_flat(first), _flat(second))


def test_training_leaves_the_global_random_state_alone(plan: Plan) -> None:
    before = torch.random.get_rng_state()
    _round(plan, [_labeled()], [_unlabeled()])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_site_with_labels_only_has_the_supervised_term_only(plan: Plan) -> None:
    _, _, result = _round(plan, [_labeled()], [])
    assert result.steps == plan.training.steps_per_round
    assert result.supervised is not None
    assert result.consistency is None
    assert result.generalist is None


def test_a_site_without_labels_learns_from_consistency_and_pseudo_labels(plan: Plan) -> None:
    specialist, _, result = _round(plan, [], [_unlabeled(pseudo_label=True)])
    assert result.supervised is None
    assert result.consistency is not None
    assert result.generalist is not None
    assert not torch.equal(_flat(specialist), _flat(new_specialist(plan)))


def test_pseudo_labels_alone_teach_the_specialist_to_find_the_object() -> None:
    plan = tiny_plan("regularizer.name=none", "training.steps_per_round=60", "pseudo_labels.schedule=constant")
    _, _, result = _round(plan, [], [_unlabeled(pseudo_label=True)])
    _, _, start = _round(tiny_plan("regularizer.name=none"), [], [_unlabeled(pseudo_label=True)])
    assert result.generalist is not None
    assert start.generalist is not None
    assert result.generalist < 0.6 * start.generalist


def test_a_site_with_nothing_to_learn_takes_no_step() -> None:
    plan = tiny_plan("regularizer.name=none", "pseudo_labels=null")
    specialist, _, result = _round(plan, [], [_unlabeled()])
    assert result.steps == 0
    assert torch.equal(_flat(specialist), _flat(new_specialist(plan)))


def test_unlabeled_scans_cannot_teach_a_supervised_plan() -> None:
    plan = tiny_plan("regularizer.name=none", "pseudo_labels=null")
    with_them, _, _ = _round(plan, [_labeled()], [_unlabeled(pseudo_label=True)])
    without, _, _ = _round(plan, [_labeled()], [])
    assert torch.equal(_flat(with_them), _flat(without))


def test_the_teacher_takes_no_gradient_and_follows_the_specialist(plan: Plan) -> None:
    specialist, teacher, _ = _round(plan, [_labeled()], [_unlabeled()])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    start = _flat(new_specialist(plan))
    assert not torch.equal(_flat(teacher), start)
    assert float((_flat(teacher) - _flat(specialist)).norm()) < float((start - _flat(specialist)).norm())


def test_the_teacher_is_the_moving_average() -> None:
    network, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = {k: 0.9 * teacher.state_dict()[k] + 0.1 * network.state_dict()[k] for k in ("weight", "bias")}
    update_teacher(teacher, network, 0.9)
    for name, value in expected.items():
        assert torch.allclose(teacher.state_dict()[name], value, atol=1e-7)


def test_a_teachers_buffers_are_copied() -> None:
    network, teacher = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    network(torch.randn(8, 2))
    update_teacher(teacher, network, 0.9)
    assert torch.equal(network.running_mean, teacher.running_mean)
    assert int(teacher.num_batches_tracked) == 1


def test_a_loss_that_is_not_finite_ends_the_round(plan: Plan) -> None:
    image = torch.full((1, 24, 24, 16), float("inf"))
    with pytest.raises(FloatingPointError, match="at step 0"):
        _round(plan, [lambda: TrainingScan(image, torch.zeros(24, 24, 16, dtype=torch.uint8))], [])


def test_the_learning_rate_falls_to_its_final_share_over_the_study(plan: Plan) -> None:
    settings = plan.training.optimizer
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates[0] == settings.learning_rate
    assert rates[-1] == pytest.approx(settings.learning_rate * settings.final_share)
    assert rates == sorted(rates, reverse=True)


def test_progress_is_told_after_each_step(plan: Plan) -> None:
    told: list[tuple[int, int]] = []
    specialist = new_specialist(plan)
    teacher = copy.deepcopy(specialist)
    local = LocalRound(
        plan, specialist, teacher, [_labeled()], [], 1, 0, CPU, progress=lambda done, total: told.append((done, total))
    )
    train_round(local)
    assert told == [(1, 2), (2, 2)]


def test_the_proximal_loss_has_gradient_w_minus_w_global_and_none_at_the_global_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=generator), torch.randn((), generator=generator)]
    weights = [nn.Parameter(value + torch.randn(value.shape, generator=generator)) for value in start]
    proximal_loss(weights, start).backward()  # type: ignore[no-untyped-call]
    for own, other in zip(weights, start, strict=True):
        assert own.grad is not None
        assert torch.allclose(own.grad, own.detach() - other)
    resting = [nn.Parameter(value.clone()) for value in start]
    proximal_loss(resting, start).backward()  # type: ignore[no-untyped-call]
    assert all(own.grad is not None and not bool(own.grad.any()) for own in resting)


@pytest.mark.parametrize("mu", [0.1, 1.0, 9.0])
def test_descent_with_the_proximal_term_ends_where_a_quadratic_says(mu: float) -> None:
    start, own_minimum = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 3.0])
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        loss = 0.5 * (weight - own_minimum).square().sum() + mu * proximal_loss([weight], [start])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.allclose(weight.detach(), (own_minimum + mu * start) / (1 + mu), atol=1e-3)


def _moved(specialist: nn.Module) -> float:
    return float((_flat(specialist) - _flat(new_specialist(tiny_plan()))).norm())


def test_the_first_step_of_a_round_does_not_feel_the_proximal_term_and_later_ones_stay_closer() -> None:
    changes = (
        "training.optimizer.name=sgd",
        "training.optimizer.learning_rate=0.05",
        "training.optimizer.weight_decay=0.0",
    )
    first = [
        _round(tiny_plan(*changes, "training.steps_per_round=1", f"training.proximal={mu}"), [_labeled()], [])[0]
        for mu in (0.0, 5.0)
    ]
    assert torch.equal(_flat(first[0]), _flat(first[1]))
    moved = [
        _moved(
            _round(tiny_plan(*changes, "training.steps_per_round=20", f"training.proximal={mu}"), [_labeled()], [])[0]
        )
        for mu in (0.0, 0.5, 5.0)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_layers_that_stay_at_the_site_are_not_held_to_the_global_specialist() -> None:
    specialist = (
        "specialist={name: unet, statistics: local, arguments: {channels: [4, 8], strides: [2], residual_units: 0, "
        "normalization: batch}}"
    )
    changes = (
        specialist,
        "training.optimizer.name=sgd",
        "training.optimizer.learning_rate=0.01",
        "training.steps_per_round=25",
    )
    plan = tiny_plan(*changes, "training.proximal=30.0")
    tethered, _, _ = _round(plan, [_labeled()], [])
    free, _, _ = _round(tiny_plan(*changes), [_labeled()], [])
    travels = set(travelling(plan, free))
    stays = {name for name, _ in free.named_parameters()} - travels
    assert stays
    assert _distance(tethered, plan, travels) < 0.5 * _distance(free, plan, travels)
    assert _distance(tethered, plan, stays) > 0.7 * _distance(free, plan, stays)


def _distance(specialist: nn.Module, plan: Plan, names: set[str]) -> float:
    start, end = new_specialist(plan).state_dict(), specialist.state_dict()
    return sum(float((end[name] - start[name]).square().sum()) for name in names) ** 0.5
