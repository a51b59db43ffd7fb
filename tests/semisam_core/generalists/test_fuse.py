"""Folding batch normalisation changes nothing but speed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from semisam_core.generalists.fuse import fuse_batch_norm


def _pair(channels: int, groups: int, bias: bool) -> nn.Sequential:
    pair = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(channels)
    )
    pair.train()
    pair(torch.randn(8, channels, 6, 6) * 2 + 1)  # statistics other than 0 and 1
    return pair


@settings(deadline=None, max_examples=20)
@given(groups=st.sampled_from([1, 2, 4]), bias=st.booleans(), seed=st.integers(0, 1000))
def test_a_fused_network_gives_the_same_output(groups: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(_pair(4, groups, bias), nn.GELU(), nn.ModuleDict({"deep": _pair(4, 1, bias)})["deep"])
    network.eval()
    image = torch.randn(2, 4, 9, 7)
    expected = network(image)
    assert fuse_batch_norm(network) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert torch.allclose(network(image), expected, atol=1e-5)


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        fuse_batch_norm(nn.Sequential(_pair(2, 1, True)))


def test_other_modules_are_left_alone() -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()),
    ).eval()
    assert fuse_batch_norm(network) == 0
