"""SAM's sizes inferred from checkpoints: the published ones, a tiny one, and some that are not SAM's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from torch import Tensor

from semisam_core.errors import WeightsError
from semisam_core.generalists.sam_network import Architecture, assemble, build_network, read_architecture
from tests.semisam_core.generalists import tiny_sam

PATH = Path("some.pth")
State = dict[str, Tensor]


def _read(state: State) -> Architecture:
    return read_architecture(state, PATH, "what is published")


@pytest.mark.parametrize(
    ("build", "width", "depth", "heads", "global_blocks"),
    [
        (build_sam_vit_b, 768, 12, 12, (2, 5, 8, 11)),
        (build_sam_vit_l, 1024, 24, 16, (5, 11, 17, 23)),
        (build_sam_vit_h, 1280, 32, 16, (7, 15, 23, 31)),
    ],
    ids=["vit-b", "vit-l", "vit-h"],
)
def test_the_published_sizes_are_recognised(
    build: Callable[[], Any], width: int, depth: int, heads: int, global_blocks: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        published = build()
    found = _read(published.state_dict())
    assert found == Architecture(
        side=1024,
        patch=16,
        width=width,
        depth=depth,
        heads=heads,
        window=14,
        global_blocks=global_blocks,
        mlp_width=4 * width,
        prompt_width=256,
        mask_width=16,
        masks=3,
        decoder_depth=2,
        decoder_mlp_width=2048,
        overlap_depth=3,
        overlap_width=256,
    )
    _same_shapes(assemble(found), published)


def _same_shapes(network: Any, published: Any) -> None:
    ours, theirs = ({name: each.shape for name, each in net.state_dict().items()} for net in (network, published))
    assert ours == theirs
    for one, other in zip(network.image_encoder.blocks, published.image_encoder.blocks, strict=True):
        assert (one.window_size, one.attn.num_heads) == (other.window_size, other.attn.num_heads)
        assert one.norm1.eps == other.norm1.eps
    one, other = network.mask_decoder.transformer, published.mask_decoder.transformer
    assert one.num_heads == other.num_heads
    assert one.final_attn_token_to_image.internal_dim == other.final_attn_token_to_image.internal_dim


def test_a_network_of_any_other_size_is_recognised() -> None:
    found = _read(tiny_sam.tiny_sam().state_dict())
    assert (found.side, found.patch, found.grid) == (tiny_sam.SIDE, tiny_sam.PATCH, tiny_sam.GRID)
    assert (found.width, found.depth, found.heads) == (tiny_sam.WIDTH, tiny_sam.DEPTH, tiny_sam.HEADS)
    assert (found.window, found.global_blocks) == (tiny_sam.WINDOW, tiny_sam.GLOBAL_BLOCKS)


def test_a_network_without_windows_attends_globally_everywhere() -> None:
    state = tiny_sam.tiny_sam().state_dict()
    for block in range(tiny_sam.DEPTH):
        for axis in "hw":
            state[f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"] = torch.zeros(15, 8)
    assert _read(state).window == 0
    assert all(block.window_size == 0 for block in assemble(_read(state)).image_encoder.blocks)  # type: ignore[union-attr]


def test_every_tensor_is_loaded_unchanged_and_none_is_left_unset() -> None:
    saved = tiny_sam.tiny_sam(seed=3)
    built = build_network(saved.state_dict(), PATH, "what is published")
    assert built.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(each, saved.state_dict()[name]) for name, each in built.state_dict().items())
    assert torch.equal(built.pixel_mean, saved.pixel_mean)
    assert {each.device.type for each in (*built.parameters(), *built.buffers())} == {"cpu"}


def test_half_precision_tensors_run_in_single_precision() -> None:
    state = {name: each.half() for name, each in tiny_sam.tiny_sam().state_dict().items()}
    assert {each.dtype for each in build_network(state, PATH, "any").parameters()} == {torch.float32}


def _without(name: str) -> Callable[[State], State]:
    return lambda state: {key: each for key, each in state.items() if key != name}


def _with(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


REL_POS = "image_encoder.blocks.{}.attn.rel_pos_h"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {"weight": torch.zeros(2)}, "it has no tensor image_encoder.patch_embed.proj.weight"),
        (lambda state: {f"module.{name}": each for name, each in state.items()}, "it has no tensor image_encoder"),
        (_without("image_encoder.pos_embed"), "it has no tensor image_encoder.pos_embed"),
        (_without(REL_POS.format(1)), r"it has no tensor image_encoder.blocks.1.attn.rel_pos_h"),
        (_with("image_encoder.pos_embed", 1, 8, 9, 32), "square images of 3 channels"),
        (_with("image_encoder.patch_embed.proj.weight", 32, 1, 8, 8), "square images of 3 channels"),
        (_with("image_encoder.pos_embed", 64, 32), r"has shape \(64, 32\), not 4 dimensions"),
        (_with("image_encoder.pos_embed", 1, 0, 0, 32), r"has shape \(1, 0, 0, 32\)"),
        (_with("image_encoder.blocks.4.norm1.weight", 32), r"image_encoder.blocks.\* are not numbered from 0"),
        (_with(REL_POS.format(2), 5, 8), r"attend to \[3, 5, 8\] tokens, not to one window or all 8"),
        (_with(REL_POS.format(0), 10, 8), "not to one window"),
        (_with(REL_POS.format(0), 9, 7), "their number of attention heads"),
        (_with("image_encoder.neck.0.weight", 40, 32, 1, 1), "40 prompt channels cannot be divided among 8 heads"),
        (_without("mask_decoder.iou_token.weight"), "do not fit Sam"),
        (_with("mask_decoder.hf_token.weight", 1, 32), "do not fit Sam"),
        (_with("mask_decoder.iou_token.weight", 1, 31), "do not fit Sam"),
    ],
)
def test_tensors_in_another_layout_are_refused_with_the_reason(change: Callable[[State], State], says: str) -> None:
    with pytest.raises(WeightsError, match=says) as caught:
        build_network(change(tiny_sam.tiny_sam().state_dict()), PATH, "what is published")
    assert str(caught.value).startswith("some.pth: these weights do not fit ")
    assert str(caught.value).endswith("accepted is what is published")
