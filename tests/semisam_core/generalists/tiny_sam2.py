"""A SAM 2.1 small enough for tests, built from its package's parts and saved in the published layout."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from semisam_core.generalists.base import GeneralistCard
from semisam_core.generalists.cards import SAM2
from semisam_core.generalists.sam2_network import build_network
from semisam_core.generalists.sam2_video import Sam2

SIDE = 64
_SMALLER = {
    "image_encoder": {
        "trunk": {"embed_dim": 8, "num_heads": 1, "stages": [1, 1, 2, 1], "global_att_blocks": [3]},
        "neck": {"backbone_channel_list": [64, 32, 16, 8]},
    },
    "memory_attention": {"num_layers": 1, "layer": {"dim_feedforward": 64}},
    "memory_encoder": {"fuser": {"num_layers": 1}},
}
_GAIN = 1.3  # large enough that prompts and memory affect answers, small enough that these are not all 0 or 1


def write_config(path: Path) -> Path:
    """Write the published configuration of the smallest SAM 2.1 with a smaller encoder and memory; return the path."""
    with importlib.resources.as_file(importlib.resources.files("sam2") / "configs/sam2.1/sam2.1_hiera_t.yaml") as full:
        OmegaConf.save(OmegaConf.merge(OmegaConf.load(full), {"model": _SMALLER}), path)
    return path


def tiny_sam2(config: Path, seed: int = 0) -> Any:
    """Return a tiny SAM 2.1 with all parameters random that sees its target on every slice.

    Args:
        config: from `write_config`.
        seed: of the parameters; the global random state is left alone.
    """
    network = build_network(config, SIDE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            _randomise(name, parameter, generator)
    set_presence(network, 10.0)
    return network.eval()


def _randomise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    inputs = parameter[0].numel()
    if parameter.ndim == 1:
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1, generator=generator)
    elif len(parameter) == 1 or name == "maskmem_tpos_enc":  # embeddings are added, not multiplied
        parameter.normal_(std=0.5, generator=generator)
    else:
        parameter.normal_(std=_GAIN / inputs**0.5, generator=generator)


def set_presence(network: Any, logit: float) -> None:
    """Make a network see its target, or no target, with the same logit on every slice."""
    score = network.sam_mask_decoder.pred_obj_score_head.layers[-1]
    with torch.no_grad():
        score.weight.zero_()
        score.bias.fill_(logit)


def save(network: Any, path: Path) -> Path:
    """Save a network in the layout of the published checkpoints; return the path."""
    torch.save({"model": network.state_dict()}, path)
    return path


def load_tiny(folder: Path, card: GeneralistCard = SAM2) -> Sam2:
    """Save a tiny SAM 2.1 in a folder and load it from there, on the CPU."""
    config = write_config(folder / "tiny.yaml")
    weights = save(tiny_sam2(config), folder / "tiny.pt")
    return Sam2.load(card, torch.device("cpu"), weights, config=config, side=SIDE)


def scene(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Return a noisy scan with two bright ellipses on every slice, in arbitrary units."""
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    ellipses = torch.zeros(shape[:2], dtype=torch.bool)
    for (row, column), (high, wide) in (((0.33, 0.48), (0.15, 0.28)), ((0.77, 0.3), (0.15, 0.2))):
        down, across = (rows / shape[0] - row) / high, (columns / shape[1] - column) / wide
        ellipses |= down**2 + across**2 <= 1
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 300 + 400 * ellipses[:, :, None] + 60 * noise
