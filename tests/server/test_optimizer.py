"""Server optimizers agree with their papers' formulas and Flower's strategies, and resume after a kill."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam
from safetensors.torch import load_file
from torch import Tensor

from semisam_core.files import save_tensors
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.optimizer import ServerOptimizer
from tests.conftest import tiny_plan

MOMENTUM = "aggregation.server_optimizer={name: momentum, learning_rate: 0.7, momentum: 0.6}"
ADAM = (
    "aggregation.server_optimizer={name: adam, learning_rate: 0.02, momentum: 0.8, second_momentum: 0.95, tau: 0.002}"
)
BATCH_NORM = (
    "specialist={name: unet, statistics: shared, arguments: {channels: [4, 8], strides: [2], residual_units: 0, "
    "normalization: batch}}"
)


def _start(plan: Plan) -> dict[str, Tensor]:
    return {name: value for name, value in new_specialist(plan).state_dict().items() if value.is_floating_point()}


def _combined(current: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the current specialist after a round of training."""
    generator = torch.Generator().manual_seed(number)
    return {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in current.items()}


def _run(plan: Plan, rounds: int) -> list[dict[str, Tensor]]:
    optimizer, states = ServerOptimizer(plan), [_start(plan)]
    for number in range(rounds):
        states.append(optimizer.step(states[-1], _combined(states[-1], number)))
    return states


def test_without_an_optimizer_the_combined_specialist_is_used_unchanged(plan: Plan) -> None:
    optimizer, current = ServerOptimizer(plan), _start(plan)
    combined = _combined(current, 0)
    assert all(torch.equal(value, combined[name]) for name, value in optimizer.step(current, combined).items())
    assert optimizer.state() == {}


def test_momentum_equals_sgd_with_momentum_on_the_change() -> None:
    plan = tiny_plan(MOMENTUM)
    states = _run(plan, 4)
    for name in states[0]:
        weight = torch.nn.Parameter(states[0][name].double())
        sgd = torch.optim.SGD([weight], lr=0.7, momentum=0.6)
        for number, state in enumerate(states[:-1]):
            weight.grad = (state[name].double() - _combined(state, number)[name].double()).clone()
            sgd.step()
        assert torch.allclose(states[-1][name].double(), weight.detach(), atol=1e-6)


def test_adam_equals_flowers_without_bias_correction() -> None:
    plan = tiny_plan(ADAM)
    states = _run(plan, 4)
    flower: Any = FedAdam(eta=0.02, beta_1=0.8, beta_2=0.95, tau=0.002)
    flower.v_t = {name: np.full(value.shape, 0.002**2) for name, value in states[0].items()}
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        flower.current_arrays = {name: value.double().numpy() for name, value in before.items()}
        record = ArrayRecord({n: Array(v.double().numpy()) for n, v in _combined(before, number).items()})
        change, first, _ = flower._compute_deltat_and_mt(record)
        flower.v_t = {name: 0.95 * value + 0.05 * change[name] ** 2 for name, value in flower.v_t.items()}
        for name, value in after.items():
            expected = before[name].double().numpy() + 0.02 * first[name] / (np.sqrt(flower.v_t[name]) + 0.002)
            assert np.allclose(value.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("settings", [MOMENTUM, ADAM])
def test_a_server_resumed_from_the_saved_state_gives_identical_weights(settings: str, tmp_path: Path) -> None:
    plan = tiny_plan(settings)
    whole = _run(plan, 5)
    optimizer, current = ServerOptimizer(plan), _start(plan)
    for number in range(2):
        current = optimizer.step(current, _combined(current, number))
    save_tensors(tmp_path / "state.safetensors", optimizer.state())
    resumed = ServerOptimizer(plan)
    resumed.load(load_file(tmp_path / "state.safetensors"), current)
    for number in range(2, 5):
        current = resumed.step(current, _combined(current, number))
    assert all(torch.equal(current[name], value) for name, value in whole[-1].items())


def test_a_state_of_another_optimizer_or_specialist_is_refused(plan: Plan) -> None:
    adam = ServerOptimizer(tiny_plan(ADAM))
    current = _start(plan)
    adam.step(current, _combined(current, 0))
    state = adam.state()
    for other in (plan, tiny_plan(MOMENTUM)):
        with pytest.raises(ValueError, match="is not that of the server optimizer"):
            ServerOptimizer(other).load(state, current)
    with pytest.raises(ValueError, match="is not that of the server optimizer adam"):
        ServerOptimizer(tiny_plan(ADAM)).load({}, current)
    spoilt = {name: value * float("nan") for name, value in state.items()}
    with pytest.raises(ValueError, match="finite"):
        ServerOptimizer(tiny_plan(ADAM)).load(spoilt, current)


@pytest.mark.parametrize("settings", [MOMENTUM, ADAM])
def test_running_statistics_take_the_combined_value_without_momentum(settings: str) -> None:
    plan = tiny_plan(settings, BATCH_NORM)
    optimizer, current = ServerOptimizer(plan), _start(plan)
    combined = _combined(current, 0)
    moved = optimizer.step(current, combined)
    running = [name for name in current if "running" in name]
    assert running
    assert all(torch.equal(moved[name], combined[name]) for name in running)
    assert not any("running" in name for name in optimizer.state())
