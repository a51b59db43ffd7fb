"""The optimizer: steps clipped, at the given rate, refused for a loss that is not finite; moments kept over rounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from semisam_core.optimizers import (
    GRADIENT_NORM,
    build_optimizer,
    descend,
    learning_rate,
    load_moments,
    moments,
)
from semisam_core.plan_sections.training import OptimizerSettings


def _network() -> nn.Linear:
    network = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network


def test_a_step_follows_the_gradient_at_the_given_rate() -> None:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=123.0)
    descend(optimizer, (network.weight * torch.tensor([1.0, 2.0, 3.0])).sum(), 0.5, 0)
    assert torch.allclose(network.weight, torch.tensor([[-0.5, -1.0, -1.5]]))


def test_gradients_do_not_accumulate() -> None:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network.weight.sum().backward()
    descend(optimizer, network.weight[0, 0], 1.0, 0)
    assert torch.allclose(network.weight, torch.tensor([[-1.0, 0.0, 0.0]]))


def test_a_steep_gradient_is_clipped() -> None:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    descend(optimizer, 1e6 * network.weight.sum(), 1.0, 0)
    assert float(network.weight.detach().norm()) == pytest.approx(GRADIENT_NORM, rel=1e-4)


def test_clipping_keeps_the_direction_over_all_parameters() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    descend(optimizer, 300 * first.sum() + 400 * second.sum(), 1.0, 0)
    assert [first.item(), second.item()] == pytest.approx([-0.6 * GRADIENT_NORM, -0.8 * GRADIENT_NORM], rel=1e-4)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_changes_no_weight(value: str) -> None:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match=f"became {value} at step 4"):
        descend(optimizer, network.weight.sum() + float(value), 1.0, 4)
    assert bool((network.weight == 0).all())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_plans_optimizer_is_built_with_its_settings(name: str) -> None:
    optimizer = build_optimizer(_network(), OptimizerSettings(name=name, learning_rate=0.01, weight_decay=0.3))
    assert type(optimizer).__name__.lower() == name
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.3)


def test_sgd_has_momentum_of_nine_tenths() -> None:
    network = _network()
    optimizer = build_optimizer(network, OptimizerSettings(name="sgd", weight_decay=0.0))
    for t in range(3):
        descend(optimizer, network.weight.sum(), 1.0, t)
    assert torch.allclose(network.weight, torch.tensor(-(1 + 1.9 + 2.71)))


def test_the_learning_rate_falls_to_its_final_share_over_the_study() -> None:
    settings = OptimizerSettings(learning_rate=0.01, final_share=0.2)
    rates = [learning_rate(step, 100, settings) for step in range(102)]
    assert rates[0] == settings.learning_rate
    assert rates[50] == pytest.approx(0.01 * (0.2 + 0.8 * 0.5**0.9))
    assert rates[100] == rates[101] == pytest.approx(0.002)
    assert rates == sorted(rates, reverse=True)


def _steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for t in range(first, first + count):
        image = torch.randn(4, 3, generator=torch.Generator().manual_seed(t))
        descend(optimizer, (network(image) ** 2 - network(image)).sum(), 0.01, t)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_with_kept_moments_are_those_of_an_optimizer_that_never_stopped(name: str) -> None:
    settings = OptimizerSettings(name=name)
    whole, parts = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    parts.load_state_dict(whole.state_dict())
    _steps(whole, build_optimizer(whole, settings), 0, 6)
    kept = moments(build_optimizer(parts, settings), parts, settings)
    for first in (0, 2, 4):
        optimizer = build_optimizer(parts, settings)
        load_moments(optimizer, parts, settings, kept)
        _steps(parts, optimizer, first, 2)
        kept = moments(optimizer, parts, settings)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_parameter_without_a_gradient_has_zero_moments(name: str) -> None:
    settings, network = OptimizerSettings(name=name), nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 1))
    optimizer = build_optimizer(network, settings)
    descend(optimizer, network[1].weight.sum(), 0.01, 0)
    found = moments(optimizer, network, settings)
    assert {key.rpartition(".")[0] for key in found} == {key for key, _ in network.named_parameters()}
    assert all((float(value.abs().sum()) > 0) == key.startswith("1.weight") for key, value in found.items())
