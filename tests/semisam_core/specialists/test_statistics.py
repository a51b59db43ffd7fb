"""Shared or local batch norm: a plan with batch norm must choose, and the tensors sent follow from it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from semisam_core.contract import disagreement, specialist_spec, travelling
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.specialists import batch_norm_tensors, build_specialist
from tests.conftest import tiny_plan
from tests.semisam_core.specialists.examples import (
    BATCHED,
    EVERY_BATCHED,
    EVERY_EXAMPLE,
    EVERY_GROUPED,
    Example,
    patches,
)


def _plan(example: Example, statistics: str | None) -> Plan:
    chosen = {"name": example.name, "arguments": example.arguments}
    if statistics is not None:
        chosen["statistics"] = statistics
    return tiny_plan(f"specialist={json.dumps(chosen)}", f"data.patch={json.dumps(list(example.patch))}")


@EVERY_BATCHED
def test_a_network_with_batch_norm_keeps_running_statistics(example: Example) -> None:
    network = build_specialist(example.name, example.arguments, 1, 1, 0).train()
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm3d)]
    assert not any(isinstance(layer, nn.InstanceNorm3d) for layer in network.modules())
    network(patches(example, batch=2) + 5)
    assert all(float(layer.running_mean.abs().max()) > 0 for layer in layers)
    assert tuple(network.eval()(patches(example)).shape) == (1, 2, *example.patch)


@EVERY_BATCHED
def test_a_plan_with_batch_norm_must_choose_shared_or_local(example: Example) -> None:
    with pytest.raises(ValidationError, match=r"specialist\.statistics is missing; .* shared .* or local"):
        _plan(example, None)
    with pytest.raises(ValidationError, match="statistics"):
        _plan(example, "global")


@EVERY_EXAMPLE
def test_a_plan_without_batch_norm_must_not_choose(example: Example) -> None:
    with pytest.raises(
        ValidationError, match=re.escape(f"specialist.statistics = local: this {example.name} keeps no")
    ):
        _plan(example, "local")
    assert _plan(example, None).specialist.statistics is None


@EVERY_GROUPED
def test_a_plan_with_group_normalisation_must_not_choose(example: Example) -> None:
    with pytest.raises(ValidationError, match="keeps no running statistics"):
        _plan(example, "shared")


@EVERY_BATCHED
def test_local_batch_norm_layers_are_not_sent_and_all_else_is(example: Example) -> None:
    plan = _plan(example, "local")
    spec, network = specialist_spec(plan), new_specialist(plan)
    layers = {name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm3d)}
    for name in network.state_dict():
        assert (name in spec) == (name.rpartition(".")[0] not in layers)
    assert len(layers) > 3


@EVERY_BATCHED
def test_shared_batch_norm_layers_are_sent_except_their_counters(example: Example) -> None:
    plan = _plan(example, "shared")
    spec, state = specialist_spec(plan), new_specialist(plan).state_dict()
    assert set(spec) == {name for name, value in state.items() if value.is_floating_point()}
    assert {name.rpartition(".")[2] for name in set(state) - set(spec)} == {"num_batches_tracked"}
    assert any(name.endswith("running_var") for name in spec)


@EVERY_BATCHED
def test_initial_weights_match_the_contract(example: Example) -> None:
    for statistics in ("shared", "local"):
        plan = _plan(example, statistics)
        assert disagreement(travelling(plan, new_specialist(plan)), specialist_spec(plan)) is None


def test_shared_and_local_plans_have_different_hashes() -> None:
    assert _plan(BATCHED["unet"], "shared").hash != _plan(BATCHED["unet"], "local").hash


def test_batch_norm_tensors_are_named_as_in_the_state_dict() -> None:
    fields = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert batch_norm_tensors(nn.BatchNorm3d(2)) == fields
    nested = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Sequential(nn.BatchNorm3d(2)))
    assert batch_norm_tensors(nested) == {f"1.0.{field}" for field in fields} <= set(nested.state_dict())
    assert batch_norm_tensors(nn.InstanceNorm3d(2, affine=True)) == set()


def test_batch_counters_do_not_affect_predictions() -> None:
    example = BATCHED["dynunet"]
    network = build_specialist(example.name, example.arguments, 1, 1, 0)
    network(patches(example, batch=2))
    network.eval()
    before = network(patches(example))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d) and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(99)
    assert torch.equal(network(patches(example)), before)
