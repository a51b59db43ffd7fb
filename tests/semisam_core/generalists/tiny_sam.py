"""A SAM small enough for tests, built from segment_anything's parts and saved in the published layout."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything import modeling
from torch import Tensor, nn

from semisam_core.generalists.base import GeneralistCard, VolumeGrid
from semisam_core.generalists.sam import Sam

SIDE, PATCH, PROMPT_WIDTH = 64, 8, 32
GRID = SIDE // PATCH
WINDOW, GLOBAL_BLOCKS, DEPTH, HEADS, WIDTH = 5, (1,), 3, 4, 32
SHAPE = (64, 48, 5)  # slices are as long as the encoder's side: a voxel is a pixel
VOXELS = VolumeGrid(SHAPE, (1.0, 1.0, 1.0))


def tiny_sam(seed: int = 1) -> Any:
    """Return a tiny SAM with all parameters random (some start at 0); does not change the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = modeling.Sam(
            modeling.ImageEncoderViT(
                img_size=SIDE,
                patch_size=PATCH,
                embed_dim=WIDTH,
                depth=DEPTH,
                num_heads=HEADS,
                mlp_ratio=2,
                out_chans=PROMPT_WIDTH,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=WINDOW,
                global_attn_indexes=GLOBAL_BLOCKS,
            ),
            modeling.PromptEncoder(
                embed_dim=PROMPT_WIDTH,
                image_embedding_size=(GRID, GRID),
                input_image_size=(SIDE, SIDE),
                mask_in_chans=8,
            ),
            modeling.MaskDecoder(
                transformer_dim=PROMPT_WIDTH,
                transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=PROMPT_WIDTH, num_heads=8, mlp_dim=48),
                iou_head_depth=3,
                iou_head_hidden_dim=24,
            ),
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.eval()


def save(content: object, path: Path) -> str:
    """Save tensors and return the file's SHA-256."""
    torch.save(content, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def loaded(card: GeneralistCard, network: Any, batch_size: int = 1) -> Sam:
    """Wrap a network as `Sam.load` would from its file."""
    return Sam(card, network.requires_grad_(False), "0" * 64, torch.device("cpu"), batch_size)


def scene(shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Return a scan of whole intensities with enough voxels of 0 and 255 on every slice to be its percentiles."""
    scan = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).float()
    scan[: shape[0] // 8], scan[shape[0] // 2 : shape[0] // 2 + shape[0] // 8] = 0, 255
    return scan
