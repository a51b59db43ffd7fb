"""SAM's network, with sizes inferred from its checkpoint: ViT-B, L, H and any other of the same layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semisam_core.errors import WeightsError
from semisam_core.generalists.weights import load_into

_CHANNELS = 3
_DECODER_HEADS = 8  # cannot be inferred from the tensors; 8 in everything that SAM's authors published
_NORM_EPS = 1e-6  # likewise


@dataclass(frozen=True)
class Architecture:
    """The sizes in which SAM's variants differ.

    Attributes:
        side: pixels along each side of the encoder's input.
        patch: pixels along each side of a token.
        width: channels of a token in the image encoder.
        depth: blocks of the image encoder.
        heads: attention heads of each block.
        window: tokens along each side of the attention window; 0 if all blocks attend globally.
        global_blocks: the blocks that attend globally.
        mlp_width: hidden channels of each block's perceptron.
        prompt_width: channels of embeddings and prompts.
        mask_width: hidden channels of the encoder of mask prompts.
        masks: answers to an ambiguous prompt.
        decoder_depth: two-way blocks of the mask decoder.
        decoder_mlp_width: hidden channels of their perceptrons.
        overlap_depth: layers of the head that predicts the IoU.
        overlap_width: its hidden channels.
    """

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    mlp_width: int
    prompt_width: int
    mask_width: int
    masks: int
    decoder_depth: int
    decoder_mlp_width: int
    overlap_depth: int
    overlap_width: int

    @property
    def grid(self) -> int:
        """Tokens along each side of the image, and of its embedding."""
        return self.side // self.patch


def read_architecture(state: dict[str, Tensor], path: Path, published: str) -> Architecture:
    """Infer the sizes of a SAM from the names and shapes of its tensors.

    Args:
        state: name -> tensor, named as in SAM's published checkpoints.
        path: the checkpoint, for error messages.
        published: what is accepted, for error messages.

    Raises:
        WeightsError: the tensors are not in SAM's layout.
    """
    layout = _Layout(state, path, published)
    width, channels, patch, patch_columns = layout.shape("image_encoder.patch_embed.proj.weight", 4)
    _, grid, grid_columns, _ = layout.shape("image_encoder.pos_embed", 4)
    if channels != _CHANNELS or patch != patch_columns or grid != grid_columns:
        raise layout.refusal("its encoder does not take square images of 3 channels")
    depth = layout.count("image_encoder.blocks.")
    heads, window, global_blocks = _attention(layout, width, depth, grid)
    prompt_width = layout.shape("image_encoder.neck.0.weight", 4)[0]
    if prompt_width % (2 * _DECODER_HEADS):
        raise layout.refusal(f"{prompt_width} prompt channels cannot be divided among {_DECODER_HEADS} heads")
    return Architecture(
        side=grid * patch,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        window=window,
        global_blocks=global_blocks,
        mlp_width=layout.shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
        prompt_width=prompt_width,
        mask_width=layout.shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        masks=layout.shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        decoder_depth=layout.count("mask_decoder.transformer.layers."),
        decoder_mlp_width=layout.shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        overlap_depth=layout.count("mask_decoder.iou_prediction_head.layers."),
        overlap_width=layout.shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


def build_network(state: dict[str, Tensor], path: Path, published: str) -> nn.Module:
    """Build the SAM that fits these tensors and load them, on the CPU in float32.

    Args:
        state: as `read_architecture`.
        path: as `read_architecture`.
        published: as `read_architecture`.

    Returns:
        The network, with `image_encoder`, `prompt_encoder` and `mask_decoder`.

    Raises:
        WeightsError: the tensors are not in SAM's layout, or one is missing or unexpected.
    """
    network = assemble(read_architecture(state, path, published))
    for part in network.children():  # not the network itself, which has buffers that no checkpoint contains
        part.to_empty(device="cpu")
    load_into(network, state, path, published)
    return network


def assemble(architecture: Architecture) -> nn.Module:
    """Return the network with all parameters on the meta device: takes no memory, draws no random numbers."""
    from segment_anything import modeling

    sizes = architecture
    with torch.device("meta"):
        image_encoder = modeling.ImageEncoderViT(
            img_size=sizes.side,
            patch_size=sizes.patch,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_width / sizes.width,
            out_chans=sizes.prompt_width,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=_NORM_EPS),
            use_rel_pos=True,
            window_size=sizes.window,
            global_attn_indexes=sizes.global_blocks,
        )
        prompt_encoder = modeling.PromptEncoder(
            embed_dim=sizes.prompt_width,
            image_embedding_size=(sizes.grid, sizes.grid),
            input_image_size=(sizes.side, sizes.side),
            mask_in_chans=sizes.mask_width,
        )
        transformer = modeling.TwoWayTransformer(
            depth=sizes.decoder_depth,
            embedding_dim=sizes.prompt_width,
            mlp_dim=sizes.decoder_mlp_width,
            num_heads=_DECODER_HEADS,
        )
        mask_decoder = modeling.MaskDecoder(
            num_multimask_outputs=sizes.masks,
            transformer=transformer,
            transformer_dim=sizes.prompt_width,
            iou_head_depth=sizes.overlap_depth,
            iou_head_hidden_dim=sizes.overlap_width,
        )
    network: nn.Module = modeling.Sam(image_encoder, prompt_encoder, mask_decoder)
    return network


def _attention(layout: _Layout, width: int, depth: int, grid: int) -> tuple[int, int, tuple[int, ...]]:
    """Return heads, window and global blocks, inferred from the lengths of the tables of relative positions."""
    names = [f"image_encoder.blocks.{block}.attn.rel_pos_h" for block in range(depth)]
    lengths, channels = zip(*(layout.shape(name, 2) for name in names), strict=True)
    if len(set(channels)) != 1 or width % channels[0]:
        raise layout.refusal("its blocks differ in their number of attention heads")
    spans = [(length + 1) // 2 for length in lengths]  # a block that sees n tokens along a side has 2n - 1 offsets
    windows = {span for span in spans if span != grid}
    if len(windows) > 1 or any(length % 2 == 0 for length in lengths):
        raise layout.refusal(f"its blocks attend to {sorted(set(spans))} tokens, not to one window or all {grid}")
    global_blocks = tuple(block for block, span in enumerate(spans) if span == grid)
    return width // channels[0], next(iter(windows), 0), global_blocks


class _Layout:
    """Names and shapes of a checkpoint's tensors, with errors that say what is accepted."""

    def __init__(self, state: dict[str, Tensor], path: Path, published: str) -> None:
        self._state = state
        self._path = path
        self._published = published

    def refusal(self, reason: str) -> WeightsError:
        """Return the error for a checkpoint with another layout."""
        return WeightsError(f"{self._path}: these weights do not fit SAM: {reason}; accepted is {self._published}")

    def shape(self, name: str, dimensions: int) -> tuple[Any, ...]:
        """Return the shape of a tensor, which must exist and have this many dimensions, none of them 0."""
        if name not in self._state:
            raise self.refusal(f"it has no tensor {name}")
        found = tuple(self._state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise self.refusal(f"the tensor {name} has shape {found}, not {dimensions} dimensions")
        return found

    def count(self, prefix: str) -> int:
        """Return the number of layers named prefix + 0, 1, 2, ..."""
        found = {name.removeprefix(prefix).split(".")[0] for name in self._state if name.startswith(prefix)}
        if not found or found != {str(number) for number in range(len(found))}:
            raise self.refusal(f"the tensors {prefix}* are not numbered from 0")
        return len(found)
