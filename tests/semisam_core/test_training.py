"""One round of local training: loss terms, updates of student and teacher, reproducibility."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from semisam_core import training
from semisam_core.contract import travelling
from semisam_core.data.patches import TrainingScan
from semisam_core.inference import new_specialist
from semisam_core.losses import (
    confidence_aware_loss,
    confident_dice_loss,
    confident_entropy_loss,
    proximal_loss,
    supervised_loss,
)
from semisam_core.plan import Plan
from semisam_core.plan_sections.pseudo_labels import PseudoLabelLoss
from semisam_core.regularizers import UnlabeledPatches
from semisam_core.training import (
    TERMS,
    Loader,
    LocalRound,
    TrainingResult,
    new_teacher,
    pseudo_label_loss,
    train_round,
    update_teacher,
)
from tests.conftest import blob, tiny_plan

CPU = torch.device("cpu")
# Plain gradient descent on unchanged scans of a patch's size: a step can be worked out by hand.
BY_HAND = (
    "task.classes=[{name: a, value: 1}, {name: b, value: 2}]",
    "training.rounds=8",
    "training.steps_per_round=1",
    "training.optimizer={name: sgd, learning_rate: 1.0, weight_decay: 0.0, final_share: 0.0}",
    "training.augmentation={flip: 0.0, affine_probability: 0.0, intensity: 0.0, noise: 0.0}",
    "regularizer={name: entropy-minimisation, weight: 3.0, ramp_share: 0.5}",
    "pseudo_labels.weight=2.0",
    "teacher.decay=0.6",
)


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


def test_a_site_with_labels_only_has_only_the_supervised_term(plan: Plan) -> None:
    _, _, result = _round(plan, [_labeled()], [])
    assert result.steps == plan.training.steps_per_round
    assert set(result.losses) == set(result.gradients) == {"supervised"}


def test_a_site_without_labels_learns_from_consistency_and_pseudo_labels(plan: Plan) -> None:
    specialist, _, result = _round(plan, [], [_unlabeled(pseudo_label=True)])
    assert set(result.losses) == set(result.gradients) == {"consistency", "generalist"}
    assert not torch.equal(_flat(specialist), _flat(new_specialist(plan)))


def test_pseudo_labels_alone_teach_the_specialist_to_find_the_object() -> None:
    plan = tiny_plan("regularizer.name=none", "training.steps_per_round=60", "pseudo_labels.schedule=constant")
    _, _, result = _round(plan, [], [_unlabeled(pseudo_label=True)])
    _, _, start = _round(tiny_plan("regularizer.name=none"), [], [_unlabeled(pseudo_label=True)])
    assert result.losses["generalist"] < 0.6 * start.losses["generalist"]


def test_without_a_loss_term_a_site_takes_no_step() -> None:
    plan = tiny_plan("regularizer.name=none", "pseudo_labels=null")
    specialist, _, result = _round(plan, [], [_unlabeled()])
    assert result.steps == 0
    assert torch.equal(_flat(specialist), _flat(new_specialist(plan)))


def test_a_supervised_plan_ignores_unlabeled_scans() -> None:
    plan = tiny_plan("regularizer.name=none", "pseudo_labels=null")
    with_them, _, _ = _round(plan, [_labeled()], [_unlabeled(pseudo_label=True)])
    without, _, _ = _round(plan, [_labeled()], [])
    assert torch.equal(_flat(with_them), _flat(without))


def _random_scans() -> tuple[TrainingScan, TrainingScan]:
    """Return a labeled scan and an unlabeled one with a pseudo-label of class 1 only, both of a patch's size."""
    generator, sides = torch.Generator().manual_seed(0), (16, 16, 8)
    known, unknown = (torch.randn((1, *sides), generator=generator) for _ in range(2))
    label = torch.randint(0, 3, sides, generator=generator).to(torch.uint8)
    target, uncertainty = torch.rand((2, *sides), generator=generator), 3 * torch.rand((2, *sides), generator=generator)
    return TrainingScan(known, label), TrainingScan(unknown, None, target, uncertainty, torch.tensor([True, False]))


def _terms(network: nn.Module, annotated: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return L_sup, L_unsup (entropy) and L_sam of the random scans as the method writes them."""
    known, unknown = _random_scans()
    assert known.label is not None
    assert unknown.target is not None
    assert unknown.uncertainty is not None
    supervised = supervised_loss(network(known.image[None]), known.label[None], annotated)
    probability = network(unknown.image[None]).softmax(1)[0]
    entropy = -(probability * probability.log()).sum(0).mean() / math.log(3)
    weight, error = torch.exp(-unknown.uncertainty[0]), (probability[1] - unknown.target[0]) ** 2
    return supervised, entropy, (weight * error).sum() / weight.sum()


def _one_step_by_hand(
    plan: Plan, number: int, annotated: tuple[int, ...] | None = None
) -> tuple[nn.Module, TrainingResult]:
    known, unknown = _random_scans()
    specialist = new_specialist(plan)
    local = LocalRound(
        plan,
        specialist,
        new_teacher(specialist),
        [lambda: known],
        [lambda: unknown],
        number,
        0,
        CPU,
        annotated=annotated,
    )
    return specialist, train_round(local)


@pytest.mark.parametrize("annotated", [None, (2,)], ids=["every class", "one class"])
@pytest.mark.parametrize("number", [1, 4, 8])
def test_a_step_descends_the_weighted_sum_of_the_three_terms(number: int, annotated: tuple[int, ...] | None) -> None:
    plan, t, total = tiny_plan(*BY_HAND), number - 1, 8
    specialist, _ = _one_step_by_hand(plan, number, annotated)
    start = new_specialist(plan)
    supervised, entropy, generalist = _terms(start, annotated)
    lambda_c = 3.0 * math.exp(-5 * (1 - min(t, 4) / 4) ** 2)
    lambda_s = 2.0 * math.exp(-5 * (t / total) ** 2)
    loss = supervised + lambda_c * entropy + lambda_s * generalist
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    rate = (1 - t / total) ** 0.9
    for before, after, gradient in zip(start.parameters(), specialist.parameters(), gradients, strict=True):
        assert torch.allclose(before - after, rate * gradient, rtol=1e-3, atol=1e-5)


def test_a_round_reports_its_terms_unweighted() -> None:
    plan = tiny_plan(*BY_HAND)
    _, result = _one_step_by_hand(plan, 4)
    expected = [term.item() for term in _terms(new_specialist(plan), None)]
    assert list(result.losses.values()) == pytest.approx(expected, rel=1e-5)


def test_a_round_reports_the_gradient_of_each_weighted_term_at_its_last_step() -> None:
    plan = tiny_plan(*BY_HAND)
    _, result = _one_step_by_hand(plan, 4)
    start = new_specialist(plan)
    weights = (1.0, 3.0 * math.exp(-5 * (1 - 3 / 4) ** 2), 2.0 * math.exp(-5 * (3 / 8) ** 2))
    for weight, term, name in zip(weights, _terms(start, None), TERMS, strict=True):
        gradients = torch.autograd.grad(weight * term, list(start.parameters()), retain_graph=True, allow_unused=True)
        norm = math.sqrt(sum(float((each**2).sum()) for each in gradients if each is not None))
        assert result.gradients[name] == pytest.approx(norm, rel=1e-4)


def test_measuring_gradients_does_not_change_the_weights(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _, _ = _round(plan, [_labeled()], [_unlabeled(pseudo_label=True)])
    monkeypatch.setattr(training._Trainer, "_gradient_norm", lambda *_: 0.0)
    unmeasured, _, _ = _round(plan, [_labeled()], [_unlabeled(pseudo_label=True)])
    assert torch.equal(_flat(measured), _flat(unmeasured))


def test_the_loss_on_pseudo_labels_is_the_sum_of_its_weighted_parts() -> None:
    shape, generator = (2, 1, 4, 4, 3), torch.Generator().manual_seed(0)
    student, target, uncertainty = (torch.rand(shape, generator=generator) for _ in range(3))
    valid = torch.tensor([[True], [False]])
    batch = UnlabeledPatches(torch.zeros(shape), target, uncertainty, valid)
    parts = [
        float(part(student, target, uncertainty, valid))
        for part in (confidence_aware_loss, confident_entropy_loss, confident_dice_loss)
    ]
    for weights in ((1.0, 0.0, 0.0), (0.5, 2.0, 0.0), (0.0, 0.0, 3.0), (1.0, 0.5, 0.25)):
        loss = pseudo_label_loss(
            student, batch, PseudoLabelLoss(squared=weights[0], cross_entropy=weights[1], dice=weights[2])
        )
        expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_louder_pseudo_labels_reach_the_student_by_the_plans_loss() -> None:
    quiet = tiny_plan("regularizer.name=none", "pseudo_labels.schedule=constant")
    loud = tiny_plan(
        "regularizer.name=none",
        "pseudo_labels.schedule=constant",
        "pseudo_labels.loss.cross_entropy=0.5",
        "pseudo_labels.loss.dice=0.5",
    )
    norms = [_round(plan, [], [_unlabeled(pseudo_label=True)])[2].gradients["generalist"] for plan in (quiet, loud)]
    assert norms[1] > 2 * norms[0]


@pytest.mark.parametrize(("number", "decay"), [(1, 0.0), (2, 0.5), (8, 0.6)])
def test_the_teacher_follows_with_a_decay_that_rises_to_the_plans(number: int, decay: float) -> None:
    plan, known = tiny_plan(*BY_HAND), _random_scans()[0]
    specialist, teacher = new_specialist(plan), new_teacher(new_specialist(tiny_plan(*BY_HAND, "seed=1")))
    before = _flat(teacher)
    train_round(LocalRound(plan, specialist, teacher, [lambda: known], [], number, 0, CPU))
    assert torch.allclose(_flat(teacher), decay * before + (1 - decay) * _flat(specialist), atol=1e-6)


def test_the_teacher_takes_no_gradient_and_follows_the_specialist(plan: Plan) -> None:
    specialist, teacher, _ = _round(plan, [_labeled()], [_unlabeled()])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    start = _flat(new_specialist(plan))
    assert not torch.equal(_flat(teacher), start)
    assert float((_flat(teacher) - _flat(specialist)).norm()) < float((start - _flat(specialist)).norm())


def test_the_teacher_is_the_exponential_moving_average() -> None:
    network, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = {k: 0.9 * teacher.state_dict()[k] + 0.1 * network.state_dict()[k] for k in ("weight", "bias")}
    update_teacher(teacher, network, 0.9)
    for name, value in expected.items():
        assert torch.allclose(teacher.state_dict()[name], value, atol=1e-7)


def test_the_teachers_buffers_are_copied_from_the_specialist() -> None:
    network, teacher = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    network(torch.randn(8, 2))
    update_teacher(teacher, network, 0.9)
    assert torch.equal(network.running_mean, teacher.running_mean)
    assert int(teacher.num_batches_tracked) == 1


def test_a_loss_that_is_not_finite_stops_the_round(plan: Plan) -> None:
    image = torch.full((1, 24, 24, 16), float("inf"))
    with pytest.raises(FloatingPointError, match="at step 0"):
        _round(plan, [lambda: TrainingScan(image, torch.zeros(24, 24, 16, dtype=torch.uint8))], [])


def test_progress_is_reported_after_each_step(plan: Plan) -> None:
    reported: list[tuple[int, int]] = []
    specialist = new_specialist(plan)
    teacher = copy.deepcopy(specialist)
    local = LocalRound(
        plan,
        specialist,
        teacher,
        [_labeled()],
        [],
        1,
        0,
        CPU,
        progress=lambda done, total: reported.append((done, total)),
    )
    train_round(local)
    assert reported == [(1, 2), (2, 2)]


def test_the_gradient_of_the_proximal_loss_is_w_minus_w_global() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=generator), torch.randn((), generator=generator)]
    weights = [nn.Parameter(value + torch.randn(value.shape, generator=generator)) for value in start]
    proximal_loss(weights, start).backward()  # type: ignore[no-untyped-call]
    for value, initial in zip(weights, start, strict=True):
        assert value.grad is not None
        assert torch.allclose(value.grad, value.detach() - initial)
    resting = [nn.Parameter(value.clone()) for value in start]
    proximal_loss(resting, start).backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None and not bool(value.grad.any()) for value in resting)


@pytest.mark.parametrize("mu", [0.1, 1.0, 9.0])
def test_descent_with_the_proximal_term_reaches_the_minimum_of_both_quadratics(mu: float) -> None:
    start, local_minimum = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 3.0])
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        loss = 0.5 * (weight - local_minimum).square().sum() + mu * proximal_loss([weight], [start])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.allclose(weight.detach(), (local_minimum + mu * start) / (1 + mu), atol=1e-3)


def _moved(specialist: nn.Module) -> float:
    return float((_flat(specialist) - _flat(new_specialist(tiny_plan()))).norm())


def test_the_proximal_term_does_not_change_the_first_step_and_keeps_later_ones_closer() -> None:
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


def test_the_proximal_term_leaves_layers_that_stay_at_the_site_free() -> None:
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
    shared = set(travelling(plan, free))
    local = {name for name, _ in free.named_parameters()} - shared
    assert local
    assert _distance(tethered, plan, shared) < 0.5 * _distance(free, plan, shared)
    assert _distance(tethered, plan, local) > 0.7 * _distance(free, plan, local)


def _distance(specialist: nn.Module, plan: Plan, names: set[str]) -> float:
    start, end = new_specialist(plan).state_dict(), specialist.state_dict()
    return sum(float((end[name] - start[name]).square().sum()) for name in names) ** 0.5
