"""One optimizer step: clipped, at the given rate, and not at all for a loss that is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from semisam_core.optimizers import GRADIENT_NORM, build_optimizer, descend
from semisam_core.plan_sections.training import Optimizer


def _network() -> nn.Linear:
    network = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network


def test_the_step_goes_down_the_gradient_at_the_given_rate() -> None:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=123.0)
    descend(optimizer, (network.weight * torch.tensor([1.0, 2.0, 3.0])).sum(), 0.5, 0)
    assert torch.allclose(network.weight, torch.tensor([[-0.5, -1.0, -1.5]]))


def test_gradients_of_earlier_losses_do_not_linger() -> None:
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


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_moves_nothing(value: str) -> None:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match=f"became {value} at step 4"):
        descend(optimizer, network.weight.sum() + float(value), 1.0, 4)
    assert bool((network.weight == 0).all())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_plans_optimizer_is_built_with_its_settings(name: str) -> None:
    optimizer = build_optimizer(_network(), Optimizer(name=name, learning_rate=0.01, weight_decay=0.3))
    assert type(optimizer).__name__.lower() == name
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.3)
