"""Specialists by name: seeded initial weights, and errors that name what is accepted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from semisam_core.specialists import SPECIALISTS, build_specialist, check_specialist, parameter_count

SMALL: dict[str, Any] = {"channels": [4, 8], "strides": [2], "residual_units": 0}
GROUPED: dict[str, Any] = {"channels": [8, 16], "strides": [2], "residual_units": 0, "normalization": "group"}
DEEP: dict[str, Any] = {"channels": [4, 8, 8, 16], "strides": [2, 2, [2, 2, 1]], "residual_units": 1}
ANY_ARGUMENTS = pytest.mark.parametrize(
    "arguments", [SMALL, GROUPED, DEEP], ids=["small", "group normalisation", "deep"]
)


def _same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31 - 1), elsewhere=st.integers(0, 10_000))
def test_initial_weights_depend_only_on_the_seed(seed: int, elsewhere: int) -> None:
    torch.manual_seed(0)
    first = build_specialist("unet", SMALL, 1, 1, seed)
    torch.manual_seed(elsewhere)
    assert _same(build_specialist("unet", SMALL, 1, 1, seed), first)
    assert not _same(build_specialist("unet", SMALL, 1, 1, seed + 1), first)


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_specialist("unet", SMALL, 1, 1, 3)
    assert torch.equal(torch.get_rng_state(), before)


@ANY_ARGUMENTS
@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (2, 3)])
def test_the_output_has_the_patchs_shape_and_a_channel_per_class_and_background(
    arguments: dict[str, Any], channels: int, classes: int
) -> None:
    network = build_specialist("unet", arguments, channels, classes, 0).eval()
    with torch.inference_mode():
        answer = network(torch.randn(2, channels, 16, 24, 8))
    assert tuple(answer.shape) == (2, 1 + classes, 16, 24, 8)
    assert bool(torch.isfinite(answer).all())


@ANY_ARGUMENTS
def test_a_specialist_has_only_trainable_parameters(arguments: dict[str, Any]) -> None:
    network = build_specialist("unet", arguments, 1, 1, 0)
    assert list(network.buffers()) == []
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert {name for name, _ in network.named_parameters()} == set(network.state_dict())


@ANY_ARGUMENTS
def test_samples_of_a_batch_do_not_influence_each_other(arguments: dict[str, Any]) -> None:
    network = build_specialist("unet", arguments, 1, 1, 0).train()
    patches = torch.randn((3, 1, 16, 16, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(network(patches)[1:2], network(patches[1:2]), atol=1e-4)


def test_the_parameter_count_is_that_of_all_trainable_values() -> None:
    assert parameter_count(nn.Sequential(nn.Linear(3, 4), nn.Conv3d(1, 2, 3))) == 3 * 4 + 4 + 2 * 27 + 2
    network = build_specialist("unet", SMALL, 1, 1, 0)
    assert parameter_count(network) == sum(each.numel() for each in network.state_dict().values())


def test_omitted_arguments_have_their_defaults() -> None:
    explicit = {"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "residual_units": 1, "normalization": "instance"}
    assert _same(build_specialist("unet", {}, 1, 1, 0), build_specialist("unet", explicit, 1, 1, 0))


def test_an_unknown_specialist_is_refused_with_the_accepted_names() -> None:
    sentence = re.escape(f"unknown specialist 'vnet9'; accepted: {', '.join(sorted(SPECIALISTS))}")
    with pytest.raises(ValueError, match=sentence):
        build_specialist("vnet9", {}, 1, 1, 0)
    with pytest.raises(ValueError, match=sentence):
        check_specialist("vnet9", {}, (16, 16, 8), 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 3}, "specialist.arguments.width"),
        ({"channels": "many"}, "specialist.arguments.channels"),
        ({"residual_units": -1}, "specialist.arguments.residual_units"),
        ({"residual_units": 9}, "specialist.arguments.residual_units"),
        ({"residual_units": True}, "specialist.arguments.residual_units"),
        ({"normalization": "layer"}, "specialist.arguments.normalization"),
        ({"strides": [2, 2]}, "one stride fewer than channels"),
        ({"channels": [4], "strides": []}, "at least two channels"),
        ({"normalization": "group"}, "channels must be multiples of 8"),
    ],
)
def test_an_invalid_argument_is_refused_with_the_accepted_ones(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        build_specialist("unet", SMALL | change, 1, 1, 0)
    assert "unet takes channels, strides, residual_units, normalization" in str(caught.value)


@pytest.mark.parametrize(
    ("patch", "axis", "side", "divisor", "accepted"),
    [
        ((18, 16, 8), 0, 18, 8, "16, 24"),
        ((16, 20, 8), 1, 20, 8, "16, 24"),
        ((16, 16, 10), 2, 10, 4, "8, 12"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_with_sides_that_do(
    patch: tuple[int, int, int], axis: int, side: int, divisor: int, accepted: str
) -> None:
    sentence = f"data.patch[{axis}] = {side} does not fit the specialist unet: it must be a multiple of {divisor}"
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        check_specialist("unet", DEEP, patch, 1)
    assert str(caught.value).endswith(f"for example {accepted}")


@settings(deadline=None, max_examples=15)
@given(sides=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 6)))
def test_an_accepted_patch_gives_an_output_of_its_size(sides: tuple[int, int, int]) -> None:
    patch = (8 * sides[0], 8 * sides[1], 4 * sides[2])
    check_specialist("unet", DEEP, patch, 1)
    network = build_specialist("unet", DEEP, 1, 1, 0).eval()
    with torch.inference_mode():
        assert tuple(network(torch.zeros(1, 1, *patch)).shape[2:]) == patch


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": (4, 8), "strides": (0,)},
        {"channels": (4, -8), "strides": (2,)},
        {"channels": (8, 16), "strides": (2,), "normalization": "group", "residual_units": 1},
    ],
)
def test_impossible_arguments_are_refused_with_a_sentence(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"specialist\.arguments"):
        check_specialist("unet", arguments, (16, 16, 16), 1)
