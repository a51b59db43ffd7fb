"""A convolution with its batch normalisation folded in gives the same answer; nothing else is touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from semisam_core.generalists.fuse import fuse_batch_norm


@dataclass(frozen=True)
class Pair:
    """One Sequential(Conv2d, BatchNorm2d), by what varies."""

    groups: int = 1
    per_group: int = 2
    kernel: int = 3
    stride: int = 1
    bias: bool = False
    affine: bool = True
    epsilon: float = 1e-5

    def build(self, channels: int) -> nn.Sequential:
        convolution = nn.Conv2d(
            channels,
            self.groups * self.per_group,
            self.kernel,
            stride=self.stride,
            padding=self.kernel // 2,
            groups=self.groups,
            bias=self.bias,
        )
        return nn.Sequential(
            convolution, nn.BatchNorm2d(convolution.out_channels, eps=self.epsilon, affine=self.affine)
        )


PAIRS = st.builds(
    Pair,
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.sampled_from([4, 8]),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    epsilon=st.sampled_from([1e-5, 1e-2]),
)


def _settled(network: nn.Module) -> nn.Module:
    """Give every batch normalisation statistics and scales of its own, as after training; evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -2.0, 2.0)
                nn.init.normal_(module.bias)
    return network.eval()


def _answer(network: nn.Module, channels: int) -> Tensor:
    frames = torch.randn((2, channels, 9, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        answer: Tensor = network(frames)
    return answer


def _norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@settings(deadline=None, max_examples=25)
@given(pairs=st.lists(PAIRS, min_size=1, max_size=4), seed=st.integers(0, 10_000), depth=st.integers(0, 3))
def test_a_fused_network_answers_as_before(pairs: list[Pair], seed: int, depth: int) -> None:
    torch.manual_seed(seed)
    network: nn.Module = nn.Sequential()
    channels = 4
    for place, pair in enumerate(pairs):
        network.append(nn.Sequential(pair.build(channels), nn.GELU()) if place % 2 else pair.build(channels))
        channels = pair.groups * pair.per_group
    for _ in range(depth):
        network = nn.Sequential(network)
    _settled(network)
    before = _answer(network, 4)
    assert fuse_batch_norm(network) == len(pairs)
    assert _norms(network) == 0
    assert torch.allclose(_answer(network, 4), before, rtol=1e-4, atol=1e-4)


def test_a_fused_pair_is_one_convolution_with_the_same_geometry() -> None:
    network = _settled(nn.Sequential(Pair(groups=2, stride=2).build(4)))
    fuse_batch_norm(network)
    fused = network[0]
    assert type(fused) is nn.Conv2d
    assert (fused.groups, fused.stride, fused.padding) == (2, (2, 2), (1, 1))
    assert fused.bias is not None


def test_pairs_are_found_inside_modules_of_any_kind() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Pair(per_group=4).build(4)
            self.others = nn.ModuleDict({"second": Pair(per_group=4).build(4)})

        def forward(self, frames: Tensor) -> Tensor:
            summed: Tensor = self.first(frames) + self.others["second"](frames)
            return summed

    network = _settled(nn.Sequential(Block(), Block()))
    before = _answer(network, 4)
    assert fuse_batch_norm(network) == 4
    assert torch.allclose(_answer(network, 4), before, rtol=1e-4, atol=1e-4)


def test_subclasses_of_sequential_with_its_own_forward_are_pairs_too() -> None:
    class ConvolutionAndNorm(nn.Sequential):
        pass

    network = _settled(nn.Sequential(ConvolutionAndNorm(*Pair().build(4))))
    before = _answer(network, 4)
    assert fuse_batch_norm(network) == 1
    assert torch.allclose(_answer(network, 4), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, 1])
def test_a_pair_of_which_either_half_is_training_is_refused_by_name(place: int) -> None:
    stem = Pair().build(4).eval()
    stem[place].train()
    network = nn.Sequential(OrderedDict(stem=stem))
    with pytest.raises(ValueError, match=r"stem is in training mode; call eval\(\)"):
        fuse_batch_norm(network)


def test_fusing_twice_finds_nothing_more() -> None:
    network = _settled(nn.Sequential(Pair().build(4)))
    assert fuse_batch_norm(network) == 1
    assert fuse_batch_norm(network) == 0


class _Doubled(nn.Sequential):
    def forward(self, frames: Tensor) -> Tensor:
        doubled: Tensor = 2 * super().forward(frames)
        return doubled


class _ScaledConvolution(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), id="three members"),
        pytest.param(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), id="the other way round"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), id="another normalisation"),
        pytest.param(nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)), id="a transposed convolution"),
        pytest.param(nn.Sequential(_ScaledConvolution(4, 4, 1), nn.BatchNorm2d(4)), id="a subclass of convolution"),
        pytest.param(_Doubled(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), id="a Sequential with another forward"),
        pytest.param(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), id="no running statistics"
        ),
    ],
)
def test_what_is_no_such_pair_stays_as_it_was(other: nn.Module) -> None:
    network = _settled(nn.Sequential(other))
    untouched = copy.deepcopy(network)
    assert fuse_batch_norm(network) == 0
    assert [type(module) for module in network.modules()] == [type(module) for module in untouched.modules()]
    assert torch.equal(_answer(network, 4), _answer(untouched, 4))
