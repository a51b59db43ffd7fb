"""Faster inference with equal results: fold batch normalisation into convolutions, fuse attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_batch_norm(module: nn.Module) -> int:
    """Replace each `Sequential(Conv2d, BatchNorm2d)`, in place and at any depth, by one equivalent convolution.

    With running mean m and variance v, BN(conv(x)) = (W x - m) * g / sqrt(v + eps) + b is itself a convolution with
    weights W * g / sqrt(v + eps), provided that the statistics no longer change.

    Args:
        module: a network in evaluation mode.

    Returns:
        How many pairs were replaced.

    Raises:
        ValueError: a pair is in training mode.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        pair = _conv_and_norm(child)
        if pair is None:
            replaced += fuse_batch_norm(child)
            continue
        convolution, norm = pair
        if convolution.training or norm.training:
            raise ValueError(f"{name} is in training mode; call eval() before fusing its batch normalisation")
        module.register_module(name, fuse_conv_bn_eval(convolution, norm))
        replaced += 1
    return replaced


def _conv_and_norm(module: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return None
    children = list(module.children())
    if len(children) != 2 or type(children[0]) is not nn.Conv2d or type(children[1]) is not nn.BatchNorm2d:
        return None
    if children[1].running_mean is None:  # batch statistics cannot be folded
        return None
    return children[0], children[1]


class FusedAttention(nn.Module):
    """TinyViT's windowed attention in one kernel.

    `scaled_dot_product_attention` with the bias b as its mask computes softmax(scale q k^T + b) v without writing the
    (windows, heads, N, N) scores to memory.
    """

    bias: Tensor

    def __init__(self, attention: Any) -> None:
        """Take over the layers of one of the package's attention modules, which is in evaluation mode."""
        super().__init__()
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv, attention.proj
        self.heads, self.scale = int(attention.num_heads), float(attention.scale)
        self.register_buffer("bias", attention.ab.detach().clone()[None], persistent=False)  # (1, heads, N, N)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of windows (B, N, C) to (B, N, C)."""
        batch, count, _ = tokens.shape
        mixed = self.qkv(self.norm(tokens)).view(batch, count, self.heads, -1).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)  # (B, heads, N, C / heads)
        answer = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.bias.to(query.dtype), scale=self.scale
        )
        fused: Tensor = self.proj(answer.transpose(1, 2).reshape(batch, count, -1))
        return fused


def fuse_attention(module: nn.Module, kind: type[nn.Module]) -> int:
    """Replace each attention of the given class, in place and at any depth, by a fused one.

    Args:
        module: a network in evaluation mode.
        kind: TinyViT's attention, whose keys and values are as wide as its queries.

    Returns:
        How many were replaced.

    Raises:
        ValueError: one is in training mode, or its values and keys differ in width.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        if not isinstance(child, kind):
            replaced += fuse_attention(child, kind)
            continue
        attention: Any = child
        if child.training:
            raise ValueError(f"{name} is in training mode; call eval() before fusing its attention")
        if attention.d != attention.key_dim:
            raise ValueError(
                f"{name} has values of width {attention.d} and keys of width {attention.key_dim}; they must be equal"
            )
        module.register_module(name, FusedAttention(attention).eval())
        replaced += 1
    return replaced
