"""Patients' gradients against the obvious slow way and against Opacus's per-sample gradients; clipping and noise."""

from __future__ import annotations

import copy

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from semisam_core.losses import supervised_loss
from semisam_core.plan_sections.privacy import Privacy
from semisam_core.privacy.gradients import PatientOptimizer, patient_gradient
from semisam_core.privacy.networks import check_network
from semisam_core.privacy.randomness import SeededRandomness
from semisam_core.specialists import build_specialist
from tests.semisam_core.privacy.steps import Known
from tests.semisam_core.specialists.examples import EVERY_BATCHED, EXAMPLES, GROUPED, Example, patches

PATIENTS, EACH = 2, 2
SLOW = ("vnet with prelu", "swinunetr v2")  # networks of these names but for an argument are tested
NETWORKS = {name: example for name, example in EXAMPLES.items() if name not in SLOW}
NETWORKS |= {f"{name} in groups": example for name, example in GROUPED.items()}


def _build(example: Example) -> nn.Module:
    return build_specialist(example.name, example.arguments, 1, 1, 0).train()


def _data(example: Example) -> tuple[Tensor, Tensor]:
    """Return EACH patches of each patient, one patient after the other, and their labels."""
    image = patches(example, batch=PATIENTS * EACH)
    return image, (image[:, 0] > 0.5).long()


def _of(patient: int) -> slice:
    return slice(EACH * patient, EACH * (patient + 1))


def _one_by_one(network: nn.Module, image: Tensor, label: Tensor) -> list[Tensor]:
    """Return each patient's gradient, flat, by a copy of the network for each."""
    found = []
    for patient in range(PATIENTS):
        alone = copy.deepcopy(network)
        supervised_loss(alone(image[_of(patient)]), label[_of(patient)]).backward()
        found.append(torch.cat([value.grad.flatten() for value in alone.parameters() if value.grad is not None]))
    return found


def _by_opacus(network: nn.Module, image: Tensor, label: Tensor) -> list[Tensor]:
    """Return each patient's gradient, flat, as the sum of Opacus's gradients of its patches in one common batch."""
    module = GradSampleModule(network, loss_reduction="sum", strict=False, force_functorch=True)
    logits = module(image)
    torch.stack([supervised_loss(logits[_of(k)], label[_of(k)]) for k in range(PATIENTS)]).sum().backward()
    per_patch = torch.cat([value.grad_sample.flatten(1) for value in module.parameters()], 1)
    return [per_patch[_of(patient)].sum(0) for patient in range(PATIENTS)]


def _ours(network: nn.Module, image: Tensor, label: Tensor) -> list[Tensor]:
    parameters = list(network.parameters())
    found = []
    for patient in range(PATIENTS):
        gradient = patient_gradient(supervised_loss(network(image[_of(patient)]), label[_of(patient)]), parameters)
        assert gradient is not None
        found.append(torch.cat([each.flatten() for each in gradient]))
    return found


def _close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(float((a - b).norm()) < 1e-3 * float(b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("example", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_patients_gradient_is_that_of_the_patient_alone(example: Example) -> None:
    network, (image, label) = _build(example), _data(example)
    check_network(network)
    # Opacus's hooks do not reach the bias table of Swin's attention: there, a copy of the network for each patient.
    oracle = _one_by_one if example.name == "swinunetr" else _by_opacus
    assert _close(_ours(network, image, label), oracle(copy.deepcopy(network), image, label))


@EVERY_BATCHED
def test_batch_norm_is_refused(example: Example) -> None:
    with pytest.raises(ValueError, match="cannot be trained with differential privacy: BatchNorm"):
        check_network(_build(example))


def test_statistics_that_outlive_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="tracking running stats"):
        check_network(nn.Sequential(nn.InstanceNorm3d(2, affine=True, track_running_stats=True)))


def test_a_gradient_that_is_not_finite_is_none() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert patient_gradient((weight * float("nan")).sum(), [weight]) is None
    assert patient_gradient((weight * float("inf")).sum(), [weight]) is None


def test_a_parameter_that_the_loss_does_not_reach_has_a_gradient_of_zero() -> None:
    reached, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    gradient = patient_gradient(reached.sum(), [reached, other])
    assert gradient is not None
    assert [each.tolist() for each in gradient] == [[1, 1], [0, 0, 0]]


def _optimizer(randomness: Known | SeededRandomness, **changes: float) -> tuple[list[nn.Parameter], PatientOptimizer]:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    settings = Privacy(**({"noise_multiplier": 2.0, "clipping_norm": 0.5, "sampling_rate": 0.5} | changes))
    return parameters, PatientOptimizer(torch.optim.SGD(parameters, lr=9.0), settings, 8, randomness)


def _flat(parameters: list[nn.Parameter]) -> list[float]:
    return [float(value) for each in parameters for value in each.detach().flatten()]


def test_each_patients_gradient_is_clipped_over_all_parameters_and_the_sum_divided_by_the_expected_number() -> None:
    randomness = Known()
    parameters, optimizer = _optimizer(randomness)
    optimizer.add([torch.tensor([3.0, 0.0]), torch.tensor([4.0])])  # norm 5: clipped to 0.5
    optimizer.add([torch.tensor([0.0, 0.3]), torch.tensor([0.0])])  # norm 0.3: as it is
    optimizer.step(rate=1.0)
    assert _flat(parameters) == pytest.approx([-0.3 / 4, -0.3 / 4, -0.4 / 4], rel=1e-5)
    assert randomness.deviations == [1.0, 1.0]


def test_nothing_of_a_step_is_left_for_the_next() -> None:
    parameters, optimizer = _optimizer(Known())
    optimizer.add([torch.tensor([0.1, 0.0]), torch.tensor([0.0])])
    optimizer.step(rate=1.0)
    before = _flat(parameters)
    optimizer.step(rate=1.0)
    assert _flat(parameters) == before


def test_a_step_without_patients_takes_a_step_of_noise() -> None:
    parameters, optimizer = _optimizer(SeededRandomness(0))
    optimizer.step(rate=1.0)
    noise = SeededRandomness(0)
    expected = [-value / 4 for size in (2, 1) for value in noise.normal(torch.Size((size,)), 1.0).tolist()]
    assert _flat(parameters) == pytest.approx(expected, rel=1e-5)


def test_the_noises_deviation_is_the_multiplier_times_the_norm_by_the_expected_number() -> None:
    parameter = nn.Parameter(torch.zeros(40_000))
    settings = Privacy(noise_multiplier=3.0, clipping_norm=0.2, sampling_rate=0.25)
    PatientOptimizer(torch.optim.SGD([parameter], lr=1.0), settings, 16, SeededRandomness(0)).step(rate=1.0)
    assert float(parameter.detach().std()) == pytest.approx(3.0 * 0.2 / (0.25 * 16), rel=0.02)


def test_what_depends_on_no_patient_is_added_after_the_division() -> None:
    parameters, optimizer = _optimizer(Known())

    def more() -> None:
        for each in parameters:
            assert each.grad is not None
            each.grad += 1.0

    optimizer.step(rate=0.5, more=more)
    assert _flat(parameters) == [-0.5, -0.5, -0.5]
