"""A tiny SAM-Med3D, a checkpoint of it in the published layout, and the published inference written out."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32
SIZES = {
    "encoder_embed_dim": 24,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "encoder_global_attn_indexes": [1],
    "prompt_embed_dim": 48,
    "image_size": SIDE,
}


def build() -> Any:
    """Return a network with random weights, positions included."""
    from medim.models.sam_med3d import build_sam3D_vit_b_ori

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_sam3D_vit_b_ori(pretrained=False, **SIZES)
        for name, parameter in network.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:  # zero when built, but not after training
                nn.init.normal_(parameter, std=0.5)
        nn.init.constant_(network.mask_decoder.iou_prediction_head.layers[-1].bias, 0.4)
    return network.eval()


def save(network: Any, path: Path) -> Path:
    """Write a checkpoint with everything that the published training script stores beside the tensors."""
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [120, 180])
    content = {
        "epoch": 3,
        "model_state_dict": network.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": schedule.state_dict(),
        "losses": [0.5, 0.4],
        "best_loss": math.inf,
        "args": argparse.Namespace(task_name="union_train", gpu_ids=[0, 1], lr=8e-4),
        "used_datas": ["train/liver"],
    }
    torch.save(content, path)
    return path


@torch.no_grad()
def encode(network: Any, image: Tensor) -> Tensor:
    """Encode one cube, whose background is 0, as the published inference does."""
    inside = image[image > 0]
    encoded: Tensor = network.image_encoder(((image - inside.mean()) / inside.std())[None, None])
    return encoded[0]


@torch.no_grad()
def decode(
    network: Any, embedding: Tensor, clicks: Sequence[Sequence[float]], labels: Sequence[int], low: Tensor
) -> tuple[Tensor, float]:
    """Return probability and predicted IoU as the published inference computes them."""
    points = [torch.tensor([clicks], dtype=torch.float32), torch.tensor([labels])] if clicks else None
    sparse, dense = network.prompt_encoder(points=points, boxes=None, masks=low[None, None])
    masks, overlap = network.mask_decoder(
        image_embeddings=embedding[None],
        image_pe=network.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    masks = F.interpolate(masks, size=(SIDE, SIDE, SIDE), mode="trilinear", align_corners=False)
    return torch.sigmoid(masks)[0, 0], float(overlap)


class Painter(nn.Module):
    """A network that does nothing but paint a ball of 6 voxels around each positive click.

    It takes and gives what SAM-Med3D does, so that only places can be wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = SimpleNamespace(img_size=SIDE)
        self.prompt_encoder = self._Prompts()

    class _Prompts:
        def __call__(self, points: tuple[Tensor, Tensor], boxes: None, masks: Tensor) -> tuple[Tensor, Tensor]:
            positions, labels = points
            return positions[0][labels[0] == 1], masks

        def get_dense_pe(self) -> None:
            return None

    def mask_decoder(self, *, sparse_prompt_embeddings: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        centres = 4 * torch.arange(8) + 1.5  # of low-resolution voxels, in voxels of the cube
        cells = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij"), -1)
        nearest = torch.stack([(cells - at).norm(dim=-1) for at in sparse_prompt_embeddings]).amin(0)
        return (6 - nearest)[None, None], torch.tensor([[1.7]])
