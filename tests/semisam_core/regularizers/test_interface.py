"""What holds for every regularizer: gradients, randomness, auxiliary networks, validation."""

from __future__ import annotations

import re

import pytest
import torch

from semisam_core.configuration import override, parse
from semisam_core.errors import ConfigError
from semisam_core.inference import new_specialist
from semisam_core.optimizers import learning_rate
from semisam_core.plan import Plan
from semisam_core.regularizers import REGULARIZERS, check_regularizer, teaches
from semisam_core.training import new_regularizer
from tests.conftest import TINY_PLAN, tiny_plan
from tests.semisam_core.regularizers.steps import (
    CPU,
    NAMES,
    SIDES,
    WITH_NETWORKS,
    Fixed,
    built,
    flat_gradient,
    losses_of,
    noise,
    plan_of,
    specialist,
    step_of,
    student_loss,
)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_student_and_not_the_teacher(name: str) -> None:
    student, teacher = specialist(0), Fixed(20 * noise(2, *SIDES))  # sure of itself: others do not teach everywhere
    student_loss(name, step_of(student, teacher)).backward()
    assert float(flat_gradient(student).norm()) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_the_students_loss_does_not_reach_the_auxiliary_networks(name: str) -> None:
    regularizer, student = built(name), specialist()
    loss = regularizer.losses(step_of(student)).student
    assert loss is not None
    loss.backward()
    assert regularizer.auxiliary is not None
    assert all(parameter.grad is None for parameter in regularizer.auxiliary.networks.parameters())


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_the_auxiliary_loss_does_not_reach_the_student(name: str) -> None:
    regularizer, student = built(name), specialist()
    loss = regularizer.losses(step_of(student, pseudo_label=True)).auxiliary
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert regularizer.auxiliary is not None
    assert float(flat_gradient(regularizer.auxiliary.networks).norm()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_computing_the_losses_changes_no_weight(name: str) -> None:
    regularizer, student, teacher = built(name), specialist(0), specialist(1)
    before = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    before = {who: {k: v.clone() for k, v in state.items()} for who, state in before.items()}
    auxiliary = regularizer.auxiliary.state() if regularizer.auxiliary is not None else {}
    regularizer.losses(step_of(student, teacher))
    assert all(torch.equal(value, before["student"][k]) for k, value in student.state_dict().items())
    assert all(torch.equal(value, before["teacher"][k]) for k, value in teacher.state_dict().items())
    if regularizer.auxiliary is not None:
        assert all(torch.equal(value, auxiliary[k]) for k, value in regularizer.auxiliary.state().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_gives_the_same_loss(name: str) -> None:
    first, second = (student_loss(name, step_of(specialist(0), specialist(1), seed=5)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["mean-teacher", "ua-mt", "ict"])
def test_another_generator_gives_another_loss(name: str) -> None:
    first, second = (student_loss(name, step_of(specialist(0), specialist(1), seed=seed)) for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_is_left_alone(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        losses_of(name, step_of(specialist(0), specialist(1)))
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_site_without_labels_has_finite_losses(name: str) -> None:
    losses = losses_of(name, step_of(specialist(0), specialist(1), labeled=False))
    assert [loss for loss in (losses.student, losses.auxiliary) if loss is not None and not bool(loss.isfinite())] == []
    assert (losses.student is None) == REGULARIZERS[name].needs_labels


@pytest.mark.parametrize("name", NAMES)
def test_several_classes_give_a_finite_gradient(name: str) -> None:
    two = '[{"name": "blob", "value": 1}, {"name": "rim", "value": 2}]'
    plan = plan_of(name, f"task.classes={two}")
    regularizer = new_regularizer(plan, CPU)
    assert regularizer is not None
    student = new_specialist(plan)
    loss = regularizer.losses(step_of(student, classes=2, pseudo_label=True)).student
    assert loss is not None
    loss.backward()
    assert bool(flat_gradient(student).isfinite().all())


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_auxiliary_networks_depend_only_on_the_plans_seed(name: str) -> None:
    torch.rand(3)
    first, again, other = built(name).auxiliary, built(name).auxiliary, built(name, "seed=1").auxiliary
    assert first is not None
    assert again is not None
    assert other is not None
    for key, value in first.state().items():
        assert torch.equal(value, again.state()[key])
    assert any(not torch.equal(value, other.state()[key]) for key, value in first.state().items())


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_auxiliary_networks_resume_from_a_kept_state(name: str) -> None:
    first, second = built(name), built(name)
    assert first.auxiliary is not None
    assert second.auxiliary is not None
    for t in range(2):
        loss = first.losses(step_of(specialist())).auxiliary
        assert loss is not None
        first.auxiliary.step(loss, t)
    fresh, kept = second.auxiliary.state(), first.auxiliary.state()
    assert any(not torch.equal(value, kept[key]) for key, value in fresh.items())
    second.auxiliary.load(kept)
    assert all(torch.equal(value, kept[key]) for key, value in second.auxiliary.state().items())


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_an_auxiliary_loss_that_is_not_finite_stops_the_round(name: str) -> None:
    auxiliary = built(name).auxiliary
    assert auxiliary is not None
    loss = sum(parameter.sum() for parameter in auxiliary.networks.parameters()) * float("nan")
    before = auxiliary.state()
    with pytest.raises(FloatingPointError, match="became nan at step 7"):
        auxiliary.step(loss, 7)
    assert all(torch.equal(value, before[key]) for key, value in auxiliary.state().items())


def test_the_second_network_follows_the_specialists_learning_rate() -> None:
    plan = plan_of("cps", "training.optimizer.name=sgd", "training.optimizer.weight_decay=0.0")
    auxiliary = built("cps", "training.optimizer.name=sgd", "training.optimizer.weight_decay=0.0").auxiliary
    assert auxiliary is not None
    before = auxiliary.state()
    loss = sum(parameter.sum() for parameter in auxiliary.networks.parameters()) * 1e-3
    auxiliary.step(loss, 2)
    rate = learning_rate(2, plan.training.total_steps, plan.training.optimizer)
    for key, value in auxiliary.state().items():
        assert torch.allclose(before[key] - value, torch.full_like(value, 1e-3 * rate), atol=1e-7)


def test_the_discriminator_learns_at_a_constant_rate() -> None:
    for t in (0, 3):
        discriminator = built("dan").auxiliary
        assert discriminator is not None
        before = discriminator.state()
        loss = sum(parameter.sum() for parameter in discriminator.networks.parameters())
        discriminator.step(loss, t)
        for key, value in discriminator.state().items():  # Adam's first step is the learning rate
            assert torch.allclose(before[key] - value, torch.full_like(value, 1e-4), atol=1e-6)


def test_the_student_sees_the_unlabeled_patches_once_and_only_if_needed() -> None:
    calls: list[int] = []
    student = specialist()
    student.register_forward_pre_hook(lambda *_: calls.append(1))
    step = step_of(student, labeled=False)
    assert calls == []
    assert torch.equal(step.logits, step.logits)
    assert calls == [1]


def test_the_name_none_gives_no_regularizer() -> None:
    assert new_regularizer(tiny_plan("regularizer.name=none"), CPU) is None


ACCEPTED = "accepted: bcp, cps, dan, entropy-minimisation, fixmatch, ict, mean-teacher, none, ua-mt"


def test_an_unknown_name_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match=re.escape(ACCEPTED)):
        check_regularizer("mean-techer", 1)
    with pytest.raises(ConfigError, match=rf"plan.yaml: .*regularizer.name = 'mean-techer'.*{ACCEPTED}"):
        parse(Plan, override(TINY_PLAN, ["regularizer.name=mean-techer"]), "plan.yaml")


def test_a_plan_with_too_few_unlabeled_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.unlabeled_batch = 1 is too small.* ict.*at least 2"):
        parse(Plan, override(TINY_PLAN, ["regularizer.name=ict", "training.unlabeled_batch=1"]), "plan.yaml")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ict"])
def test_one_unlabeled_patch_per_step_is_enough_for_the_others(name: str) -> None:
    assert bool(student_loss(name, step_of(specialist(0), specialist(1), count=1)).isfinite())


@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_only_regularizers_that_compare_or_mix_with_labeled_patches_need_labels(name: str) -> None:
    assert teaches(name, 1) == (name != "none")
    assert teaches(name, 0) == (name not in ("none", "dan", "bcp"))
