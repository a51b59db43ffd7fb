"""SAM 2's network, built from the configuration of its package that fits a weights file."""

from __future__ import annotations

import contextlib
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STRIDE = 16  # pixels of the input along each side of a token of the memory
_SIZES = {(96, 12): "t", (96, 16): "s", (112, 24): "b+", (144, 48): "l"}  # (width, blocks) of the Hiera encoder
_WIDTH = "image_encoder.trunk.patch_embed.proj.weight"
_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_ONLY_2_1 = "no_obj_embed_spatial"  # a tensor that only SAM 2.1 has


def published_config(state: Mapping[str, Tensor]) -> str | None:
    """Find the package's configuration that fits these tensors.

    Args:
        state: name -> tensor, as in the published checkpoints of SAM 2, SAM 2.1 and models fine-tuned from them.

    Returns:
        The configuration's path under the package's `configs`, or None if none fits.
    """
    if _WIDTH not in state:
        return None
    blocks = {int(found[1]) for found in map(_BLOCK.match, state) if found}
    size = _SIZES.get((int(state[_WIDTH].shape[0]), len(blocks)))
    generation = "sam2.1" if _ONLY_2_1 in state else "sam2"
    return None if size is None else f"{generation}/{generation}_hiera_{size}.yaml"


def build_network(config: str | Path, side: int) -> Any:
    """Build the package's video predictor, without its weights.

    The settings that the package adds are kept except hole filling, which needs its compiled extension and alters
    answers by a threshold. The caller's random state and Hydra's global state are not changed.

    Args:
        config: from `published_config`, or a file in the same format.
        side: pixels along each side of the input, a multiple of 32.
    """
    with _hydra_state_restored(), torch.random.fork_rng(devices=[]):
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        source = config if isinstance(config, Path) else importlib.resources.files("sam2") / "configs" / config
        with importlib.resources.as_file(source) as path:
            shipped = OmegaConf.load(path)
        return instantiate(OmegaConf.merge(shipped.model, _settings(side)))


def _settings(side: int) -> dict[str, Any]:
    tokens = {"feat_sizes": [side // STRIDE, side // STRIDE]}
    lazily = {"position_encoding": {"warmup_cache": False}}  # else it allocates on a GPU even if it runs on the CPU
    return {
        "_target_": "sam2.sam2_video_predictor.SAM2VideoPredictor",
        "image_size": side,
        "image_encoder": {"neck": lazily},
        "memory_encoder": lazily,
        "memory_attention": {"layer": {"self_attention": tokens, "cross_attention": tokens}},
        "binarize_mask_from_pts_for_mem_enc": True,
        "sam_mask_decoder_extra_args": {
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
        "fill_hole_area": 0,
        "non_overlap_masks": False,
    }


@contextlib.contextmanager
def _hydra_state_restored() -> Iterator[None]:
    """Restore Hydra's global state, which the package initialises on import for the whole process."""
    from hydra.core.singleton import Singleton

    before = Singleton.get_state()
    try:
        yield
    finally:
        Singleton.set_state(before)
