"""Sliding-window prediction of a whole scan: probabilities for every voxel, and no side effects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from semisam_core.inference import new_specialist, predict
from semisam_core.plan import Plan
from tests.conftest import tiny_plan

CPU = torch.device("cpu")
TWO_CLASSES = "task.classes=[{name: first, value: 1}, {name: second, value: 2}]"


class Bright(nn.Module):
    """A fixed specialist: a voxel's intensity is the logit of the only class."""

    def forward(self, patches: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(patches), patches], 1)


class Counting(Bright):
    """A specialist that counts the windows it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, patches: Tensor) -> Tensor:
        self.windows += len(patches)
        return super().forward(patches)


class ModeDependent(nn.Module):
    """A specialist whose answers differ between training and evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm3d(1))

    def forward(self, patches: Tensor) -> Tensor:
        return torch.cat([patches, self.inner(patches)], 1)


def _image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((16, 16, 8), id="one patch"),
        pytest.param((32, 32, 16), id="a multiple of the patch"),
        pytest.param((21, 35, 11), id="not a multiple of the patch"),
        pytest.param((5, 9, 4), id="smaller than the patch"),
        pytest.param((40, 6, 9), id="smaller along one axis"),
    ],
)
def test_every_voxel_of_the_scan_gets_probabilities_that_sum_to_one(shape: tuple[int, int, int]) -> None:
    plan = tiny_plan(TWO_CLASSES)
    probability = predict(new_specialist(plan), _image(*shape), plan, CPU)
    assert (tuple(probability.shape), probability.dtype) == ((3, *shape), torch.float32)
    assert bool(((probability >= 0) & (probability <= 1)).all())
    assert torch.allclose(probability.sum(0), torch.ones(shape), atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(4, 30), st.integers(4, 30), st.integers(4, 20)),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_windows_join_without_seams_and_every_voxel_keeps_its_place(
    shape: tuple[int, int, int], overlap: float
) -> None:
    image = _image(*shape)
    probability = predict(Bright(), image, tiny_plan(f"evaluation.overlap={overlap}"), CPU)
    assert torch.allclose(probability[1], torch.sigmoid(image[0]), atol=1e-4)


@pytest.mark.parametrize(("overlap", "windows"), [(0.0, 2), (0.25, 3), (0.5, 3), (0.75, 5)])
def test_windows_overlap_as_much_as_asked(overlap: float, windows: int) -> None:
    image, by_plan, by_argument = _image(32, 16, 8), Counting(), Counting()
    predict(by_plan, image, tiny_plan(f"evaluation.overlap={overlap}"), CPU)
    predict(by_argument, image, tiny_plan("evaluation.overlap=0.9"), CPU, overlap)
    assert by_plan.windows == by_argument.windows == windows


def test_every_channel_is_used() -> None:
    plan = tiny_plan("task.channels=[t1, t2]")
    image = torch.cat([_image(16, 16, 8), _image(16, 16, 8, seed=1)])
    network = new_specialist(plan)
    changed = image.clone()
    changed[1] += _image(16, 16, 8, seed=2)[0]
    assert not torch.allclose(predict(network, image, plan, CPU), predict(network, changed, plan, CPU))


def test_prediction_is_deterministic(plan: Plan) -> None:
    network, image = new_specialist(plan), _image(20, 18, 9)
    assert torch.equal(predict(network, image, plan, CPU), predict(network, image, plan, CPU))


def test_initial_weights_depend_on_the_plan_alone(plan: Plan) -> None:
    image = _image(16, 16, 8)
    one, other = (predict(new_specialist(plan), image, plan, CPU) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(predict(new_specialist(tiny_plan("seed=1")), image, plan, CPU), one)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_runs_in_evaluation_mode_and_restores_the_networks_own(plan: Plan, training: bool) -> None:
    network, image = ModeDependent(), _image(20, 18, 9)
    expected = predict(network.eval(), image, plan, CPU)
    network.train(training)
    assert torch.equal(predict(network, image, plan, CPU), expected)
    assert all(module.training is training for module in network.modules())


def test_prediction_changes_neither_weights_nor_statistics_nor_gradients_nor_the_scan(plan: Plan) -> None:
    network, image = ModeDependent().train(), _image(20, 18, 9)
    before, untouched = {name: each.clone() for name, each in network.state_dict().items()}, image.clone()
    probability = predict(network, image, plan, CPU)
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert torch.equal(image, untouched)
    assert not probability.requires_grad


def test_prediction_draws_no_random_numbers(plan: Plan) -> None:
    network = new_specialist(plan).train()
    before = torch.get_rng_state()
    predict(network, _image(20, 18, 9), plan, CPU)
    assert torch.equal(torch.get_rng_state(), before)
