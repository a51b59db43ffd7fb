"""A private round: what one patient can change, who takes part, and that every step is noised and taken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from semisam_core import training
from semisam_core.data.patches import TrainingScan
from semisam_core.errors import CaseError
from semisam_core.inference import new_specialist
from semisam_core.losses import supervised_loss
from semisam_core.plan import Plan
from semisam_core.privacy.randomness import Randomness, SeededRandomness
from semisam_core.privacy.training import Patient, train_private_round
from semisam_core.training import Loader, LocalRound, TrainingResult, new_teacher
from tests.conftest import blob, tiny_plan
from tests.semisam_core.privacy.steps import Known

CPU = torch.device("cpu")
NORM = 0.05  # below every gradient here, so that each patient's is clipped
PRIVATE = (
    "privacy={noise_multiplier: 1.0, clipping_norm: 0.05, sampling_rate: 0.5, patches_per_patient: 2}",
    "training.steps_per_round=1",
    "training.optimizer={name: sgd, learning_rate: 1.0, weight_decay: 0.0, final_share: 1.0}",
    "regularizer={name: mean-teacher, weight: 1.0, ramp_share: 0.0}",
)
# No augmentation of scans of a patch's size: every patch is the scan, so that a step can be worked out by hand.
UNCHANGED = ("training.augmentation={flip: 0.0, affine_probability: 0.0, intensity: 0.0, noise: 0.0}",)


def _scan(seed: int, labeled: bool, shape: tuple[int, int, int] = (24, 24, 16)) -> Loader:
    image, label = blob(shape, seed)
    volume, mask = torch.from_numpy(image)[None] / 50, torch.from_numpy(label)
    if labeled:
        return lambda: TrainingScan(volume, mask)
    target = mask.float()[None]
    return lambda: TrainingScan(volume, None, target, torch.zeros_like(target), torch.tensor([True]))


def _patient(seed: int) -> Patient:
    """Return a patient with a labeled scan and two unlabeled ones."""
    return Patient(f"p{seed}", [_scan(seed, True)], [_scan(100 + seed, False), _scan(200 + seed, False)])


def _round(
    plan: Plan, patients: Sequence[Patient], randomness: Randomness, number: int = 1
) -> tuple[nn.Module, nn.Module, TrainingResult]:
    specialist = new_specialist(plan)
    teacher = new_teacher(specialist)
    local = LocalRound(plan, specialist, teacher, (), (), number, 7, CPU)
    return specialist, teacher, train_private_round(local, patients, randomness)


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in network.parameters()])


def _sum(plan: Plan, patients: Sequence[Patient], chosen: Sequence[int] | None = None) -> Tensor:
    """Return the sum of clipped gradients of one step, as it can be read from the weights before and after."""
    specialist, _, _ = _round(plan, patients, Known([range(len(patients)) if chosen is None else chosen]))
    return (_flat(new_specialist(plan)) - _flat(specialist)) * 0.5 * len(patients)


def test_a_step_is_the_clipped_gradient_of_the_patients_whole_loss_by_the_expected_number() -> None:
    plan = tiny_plan(*PRIVATE, *UNCHANGED, "regularizer.name=none", "pseudo_labels=null")
    scan = _scan(3, True, plan.data.patch)
    network, known = new_specialist(plan), scan()
    assert isinstance(known.image, Tensor)
    assert known.label is not None
    supervised_loss(network(known.image[None]), known.label[None]).backward()
    gradient = torch.cat([value.grad.flatten() for value in network.parameters() if value.grad is not None])
    expected = gradient * NORM / gradient.norm()
    assert float((_sum(plan, [Patient("a", [scan])]) - expected).norm()) < 1e-3 * NORM


def test_labeled_and_unlabeled_terms_of_a_patient_are_clipped_together() -> None:
    plan = tiny_plan(*PRIVATE)
    whole = _patient(1)
    parts = [Patient(whole.id, labeled=whole.labeled), Patient(whole.id, unlabeled=whole.unlabeled)]
    together, supervised, unsupervised = (_sum(plan, [each]) for each in (whole, *parts))
    assert float(together.norm()) == pytest.approx(NORM, rel=1e-3)
    assert float(supervised.norm()) == pytest.approx(NORM, rel=1e-3)
    assert not torch.allclose(together, supervised, atol=1e-3 * NORM)
    assert not torch.allclose(together, unsupervised, atol=1e-3 * NORM)


@pytest.mark.parametrize("regularizer", ["mean-teacher", "ua-mt", "fixmatch", "entropy-minimisation"])
def test_one_patient_more_changes_the_sum_by_the_patients_own_clipped_gradient_alone(regularizer: str) -> None:
    plan = tiny_plan(*PRIVATE, f"regularizer.name={regularizer}")
    everyone = [_patient(seed) for seed in range(3)]
    without = [everyone[0], everyone[2]]
    difference = _sum(plan, everyone) - _sum(plan, without)
    assert float((difference - _sum(plan, [everyone[1]])).norm()) < 1e-3 * NORM
    assert float(difference.norm()) <= NORM * 1.001


def test_patients_who_were_not_drawn_change_nothing() -> None:
    plan = tiny_plan(*PRIVATE)
    drawn = _sum(plan, [_patient(0), _patient(1)], chosen=[0])
    other = _sum(plan, [_patient(0), _patient(2)], chosen=[0])
    assert torch.equal(drawn, other)


def test_every_patient_is_drawn_with_the_plans_rate_at_every_step() -> None:
    plan, randomness = tiny_plan(*PRIVATE, "training.steps_per_round=4"), Known([[0], [], [1], []])
    _, _, result = _round(plan, [_patient(0), _patient(1)], randomness)
    assert result.steps == 4
    assert randomness.rates == [0.5] * 4
    tensors = len(list(new_specialist(plan).parameters()))
    assert randomness.deviations == [NORM] * 4 * tensors


def test_a_step_on_nobody_is_a_step_of_noise() -> None:
    plan = tiny_plan(*PRIVATE)

    class Nobody(SeededRandomness):
        def chosen(self, count: int, rate: float) -> list[int]:
            return []

    specialist, _, result = _round(plan, [_patient(0)], Nobody(0))
    assert result.steps == 1
    assert result.losses == {}
    change = (_flat(specialist) - _flat(new_specialist(plan))) * 0.5
    assert float(change.std()) == pytest.approx(NORM, rel=0.15)


def test_a_site_without_patients_takes_no_step() -> None:
    plan, randomness = tiny_plan(*PRIVATE), Known()
    specialist, _, result = _round(plan, [], randomness)
    assert result.steps == 0
    assert randomness.deviations == []
    assert torch.equal(_flat(specialist), _flat(new_specialist(plan)))


def test_patients_of_whom_nothing_teaches_are_as_many_as_before() -> None:
    plan, randomness = tiny_plan(*PRIVATE), Known()
    specialist, _, result = _round(plan, [Patient("a"), Patient("b")], randomness)
    assert result.steps == 1
    assert randomness.deviations != []
    assert torch.equal(_flat(specialist), _flat(new_specialist(plan)))


def test_a_patient_whose_gradient_is_not_finite_or_whose_scan_is_lost_contributes_nothing() -> None:
    def lost() -> TrainingScan:
        raise CaseError("case-9: the case became unusable during the round.")

    def unreadable() -> TrainingScan:
        raise OSError("input/output error")

    plan = tiny_plan(*PRIVATE)
    endless = TrainingScan(torch.full((1, 24, 24, 16), float("inf")), torch.ones((24, 24, 16), dtype=torch.uint8))
    bad = [Patient("x", [lost]), Patient("y", [unreadable]), Patient("z", [lambda: endless])]
    alone = _sum(plan, [_patient(0)])
    assert float(alone.norm()) > 0
    assert float((_sum(plan, [*bad, _patient(0)]) - alone).norm()) < 1e-3 * NORM


def test_a_seed_repeats_a_round_bit_by_bit_and_leaves_global_randomness_alone() -> None:
    plan = tiny_plan(*PRIVATE, "training.steps_per_round=3")
    patients, before = [_patient(0), _patient(1)], torch.random.get_rng_state()
    first, second, other = (_flat(_round(plan, patients, SeededRandomness(seed))[0]) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_patches_differ_from_step_to_step_and_from_patient_to_patient() -> None:
    plan = tiny_plan(*PRIVATE)
    same = [Patient(name, _patient(0).labeled) for name in ("a", "b")]
    first, second = (_sum(plan, [each]) for each in same)
    assert not torch.allclose(first, second, atol=1e-3 * NORM)
    two_steps = tiny_plan(*PRIVATE, "training.steps_per_round=2")
    specialist, _, _ = _round(two_steps, same[:1], Known([[], [0]]))  # the first step changes nothing
    later = (_flat(new_specialist(two_steps)) - _flat(specialist)) * 0.5
    assert float(later.norm()) == pytest.approx(NORM, rel=1e-3)
    assert not torch.allclose(later, first, atol=1e-3 * NORM)


def test_the_proximal_term_is_added_without_clipping() -> None:
    changes = (*PRIVATE, "training.steps_per_round=2", "regularizer.name=none", "pseudo_labels=null")
    pulled, free = tiny_plan(*changes, "training.proximal=0.5"), tiny_plan(*changes)
    one, _, _ = _round(tiny_plan(*changes, "training.steps_per_round=1"), [_patient(0)], Known([[0]]))
    start = _flat(new_specialist(free))
    with_term, without = (_flat(_round(plan, [_patient(0)], Known([[0], []]))[0]) for plan in (pulled, free))
    # The gradient of the second step is the pull alone: mu times the way that the first step went.
    assert torch.allclose(with_term, without - 0.5 * (_flat(one) - start), atol=1e-6)
    assert not torch.allclose(with_term, without, atol=1e-5)


def test_the_teacher_follows_and_schedules_go_on_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = training.consistency_weight

    def noted(step: int, ramp: float, weight: float) -> float:
        seen.append(step)
        return real(step, ramp, weight)

    monkeypatch.setattr(training, "consistency_weight", noted)
    plan = tiny_plan(*PRIVATE, "teacher.decay=0.5", "training.steps_per_round=2")
    specialist, teacher, _ = _round(plan, [_patient(0)], Known(), number=2)
    assert seen == [2, 3]
    assert not torch.equal(_flat(teacher), _flat(new_specialist(plan)))
    assert not torch.equal(_flat(teacher), _flat(specialist))


def test_supervised_plans_never_read_unlabeled_scans() -> None:
    def never() -> TrainingScan:
        raise AssertionError("an unlabeled scan was read")

    plan = tiny_plan(*PRIVATE, "regularizer.name=none", "pseudo_labels=null")
    assert float(_sum(plan, [Patient("a", [_scan(0, True)], [never])]).norm()) > 0


def test_weights_that_are_not_finite_end_the_round() -> None:
    class Endless(Known):
        def normal(self, shape: torch.Size, deviation: float) -> Tensor:
            return torch.full(shape, float("inf"), dtype=torch.float64)

    with pytest.raises(FloatingPointError, match="no longer finite after round 1"):
        _round(tiny_plan(*PRIVATE), [_patient(0)], Endless())


def test_a_plan_without_privacy_and_a_network_that_mixes_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="no privacy section"):
        _round(tiny_plan(), [_patient(0)], Known())
    plan = tiny_plan(*PRIVATE)
    mixing = tiny_plan("specialist.arguments.normalization=batch", "specialist.statistics=shared")
    local = LocalRound(plan, new_specialist(mixing), new_teacher(new_specialist(mixing)), (), (), 1, 7, CPU)
    with pytest.raises(ValueError, match="BatchNorm"):
        train_private_round(local, [_patient(0)], Known())
