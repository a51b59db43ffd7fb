"""SAM-Med3D and its relatives: 3D promptable models that take clicks and a mask in cubes of 1.5 mm voxels."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisam_core.errors import WeightsError
from semisam_core.generalists.base import GeneralistCard, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.crops import CropLattice, CropPrompts, crop_prompts
from semisam_core.generalists.weights import load_into, load_verified_state

_LOW_RESOLUTION = 4  # voxels of a cube along each edge of a voxel of the decoder's masks
_SUREST = 1e-4  # probabilities of a mask prompt are kept this far from 0 and 1, so that logits stay within 9.2


class SamMed3D:
    """A frozen SAM-Med3D (3D ViT encoder, SAM decoder). Its embedding units are cubes of `CropLattice`.

    An embedding is (384, 8, 8, 8). The scan comes in RAS axis order, as in the published inference. The published
    training fits no predicted IoU: take its quality for no more than a number that the network gives.
    """

    def __init__(self, card: GeneralistCard, network: Any, weights_sha256: str, device: torch.device) -> None:
        """Take a network that is loaded, frozen and on its device; see `load`.

        Args:
            card: which of the models this is.
            network: with `image_encoder`, `prompt_encoder` and `mask_decoder`.
            weights_sha256: SHA-256 of the file that its weights came from.
            device: where the network is.
        """
        self.network = network
        self.card = card
        self.weights_sha256 = weights_sha256
        self._device = device
        self._side = int(network.image_encoder.img_size)

    @classmethod
    def load(cls, card: GeneralistCard, device: torch.device, weights: Path, sha256: str | None = None) -> SamMed3D:
        """Read verified weights and build the network that they are of.

        Args:
            card: which of the models this is.
            device: where it runs: float32 on a CPU, the encoder in half precision on a GPU.
            weights: a checkpoint in the published layout, {"model_state_dict": tensors}.
            sha256: the hash that the file must have, in hexadecimal; None accepts any.

        Raises:
            WeightsError: the weights are missing, altered or of another architecture.
        """
        published = f"{card.source} ({card.licence})"
        # The published training script keeps its command-line arguments beside the tensors: attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state, found = load_verified_state(weights, sha256, published, torch.device("cpu"))
        network = _build(Architecture.of(state, weights, published))
        load_into(network, state, weights, published)
        network.eval().requires_grad_(False)
        network.to(device)
        return cls(card, network, found, device)

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the cubes that cover the clicks and the mask's foreground; see `crop_prompts`.

        Raises:
            ValueError: a click is outside the scan, or the mask has another shape.
        """
        return tuple(crop_prompts(CropLattice(grid, self._side), prompts))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode cubes of a scan.

        Args:
            volume: (H, W, D) in RAS axis order, in any intensity unit; its darkest voxels count as background.
            grid: the scan's voxels.
            units: cubes of the scan.

        Returns:
            cube -> (384, 8, 8, 8) float32 on the CPU.

        Raises:
            ValueError: the scan has another shape, is not finite, or has no such cube.
        """
        if tuple(volume.shape) != grid.shape:
            raise ValueError(f"the scan has shape {tuple(volume.shape)}, not {grid.shape}")
        lattice = CropLattice(grid, self._side)
        for unit in units:
            lattice.origin(unit)
        if not bool(torch.isfinite(volume).all()):
            raise ValueError("the scan has intensities that are not finite; clean them before embedding")
        # Background becomes exactly 0, as in the scans of the published training, and so does interpolation within it.
        resampled = lattice.resample(volume.float() - volume.min().float())
        # Cloned out of inference mode: ordinary tensors.
        return {unit: self._encode(standardised(lattice.cut(resampled, unit))).clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Segment what the clicks and the mask point at. Where cubes overlap, their probabilities are averaged.

        Without a mask an empty one (logits of 0) is given, as for the first click in training; a refinement passes its
        last answer as the mask.

        Args:
            embeddings: cube -> (384, 8, 8, 8), of every cube in `units`.
            prompts: clicks in voxels of the scan, and the mask.
            grid: the scan's voxels.

        Returns:
            Probability (H, W, D) and predicted IoU of each cube, both on the CPU.

        Raises:
            ValueError: a click is outside the scan, the mask has another shape, or a cube has no embedding.
        """
        lattice = CropLattice(grid, self._side)
        clicks = crop_prompts(lattice, prompts)
        if missing := sorted(set(clicks) - set(embeddings)):
            raise ValueError(f"no embedding for the prompted crops {missing}; embed units(prompts) first")
        mask = None if prompts.mask is None else lattice.resample(prompts.mask.cpu())
        cubes: dict[int, Tensor] = {}
        quality: dict[int, float] = {}
        for unit, inside in clicks.items():
            low = self._no_mask() if mask is None else mask_logits(lattice.cut(mask, unit))
            cubes[unit], overlap = self._decode(embeddings[unit], inside, low)
            quality[unit] = min(max(overlap, 0.0), 1.0)
        return Segmentation(lattice.restore(cubes), quality)

    def _no_mask(self) -> Tensor:
        side = self._side // _LOW_RESOLUTION
        return torch.zeros(side, side, side)

    @torch.inference_mode()
    def _encode(self, cube: Tensor) -> Tensor:
        """Map a cube (128, 128, 128) to its embedding (384, 8, 8, 8), float32 on the CPU."""
        batch = cube.to(self._device)[None, None]
        with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
            encoded: Tensor = self.network.image_encoder(batch)
        return encoded[0].float().cpu()

    @torch.inference_mode()
    def _decode(self, embedding: Tensor, clicks: CropPrompts, low: Tensor) -> tuple[Tensor, float]:
        """Map an embedding, clicks and mask logits (32, 32, 32) to probability (128, 128, 128) and predicted IoU.

        Clicks are given in tensor axis order, as in the published training. The published positional encoding of the
        image has its first two axes swapped against that of clicks; the weights were trained so, and it is kept.
        """
        sparse, dense = self.network.prompt_encoder(  # (1, N + 1, 384), (1, 384, 8, 8, 8)
            points=self._points(clicks), boxes=None, masks=low.to(self._device)[None, None]
        )
        logits, overlap = self.network.mask_decoder(  # (1, 1, 32, 32, 32), (1, 1)
            image_embeddings=embedding.to(self._device, torch.float32)[None],
            image_pe=self.network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        size = (self._side, self._side, self._side)
        upsampled = F.interpolate(logits.float(), size=size, mode="trilinear", align_corners=False)
        return torch.sigmoid(upsampled)[0, 0].cpu(), float(overlap[0, 0])

    def _points(self, clicks: CropPrompts) -> tuple[Tensor, Tensor] | None:
        """Return (1, N, 3) whole-voxel positions, to which the prompt encoder adds 0.5, and (1, N) labels."""
        if not clicks.positions:
            return None
        positions = torch.tensor([clicks.positions], dtype=torch.float32, device=self._device)
        return positions, torch.tensor([clicks.positive], dtype=torch.float32, device=self._device)


def load(card: GeneralistCard, device: torch.device, weights: Path | None, sha256: str | None) -> SamMed3D:
    """Load a model for the registry; see `SamMed3D.load`.

    Raises:
        WeightsError: no weights file is given, or as `SamMed3D.load`.
    """
    if weights is None:
        raise WeightsError(f"the generalist {card.name} has no packaged weights; accepted is {card.source}")
    return SamMed3D.load(card, device, weights, sha256)


def standardised(cube: Tensor) -> Tensor:
    """Give the voxels above 0 of a cube mean 0 and standard deviation 1, and move the others alike.

    As published, background and padding are 0 and do not count. A cube in which nothing differs becomes 0.
    """
    inside = cube[cube > 0]
    if inside.numel() < 2 or not float(inside.std()) > 0:
        return torch.zeros_like(cube)
    return (cube - inside.mean()) / inside.std()


def mask_logits(cube: Tensor) -> Tensor:
    """Map the foreground probability in a cube (S, S, S) to the logits (S/4, S/4, S/4) of a mask prompt.

    Logits are averaged, not probabilities: the decoder's answers are upsampled as logits, and so come back best.
    """
    return F.avg_pool3d(torch.logit(cube, eps=_SUREST)[None], _LOW_RESOLUTION)[0]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a SAM-Med3D, read off its tensors.

    Not in the tensors, and fixed by the package that has the architecture as they were published: windows of 14, and in
    the decoder 8 heads, 2 layers and 3 further masks. Tensors of other sizes than these give do not load.

    Attributes:
        width: channels of the encoder.
        depth: blocks of the encoder.
        heads: attention heads of each block.
        unwindowed: the blocks whose attention spans the whole cube.
        channels: of embeddings and prompts.
        side: voxels along each edge of a cube.
        patch: voxels along each edge of a patch.
    """

    width: int
    depth: int
    heads: int
    unwindowed: tuple[int, ...]
    channels: int
    side: int
    patch: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], path: Path, published: str) -> Architecture:
        """Read the sizes off named tensors.

        Raises:
            WeightsError: the tensors are of another architecture.
        """
        depth = sum(name.startswith("image_encoder.blocks.") and name.endswith(".attn.rel_pos_d") for name in state)
        try:
            _, cells, _, _, width = state["image_encoder.pos_embed"].shape
            patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
            channels = state["image_encoder.neck.0.weight"].shape[0]
            spans = [tuple(state[f"image_encoder.blocks.{block}.attn.rel_pos_d"].shape) for block in range(depth)]
            heads = width // spans[0][1]
            # A block's table of relative positions has 2n - 1 rows: of its window, or of all patches along the cube.
            unwindowed = tuple(block for block, span in enumerate(spans) if span[0] == 2 * cells - 1)
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise _other(path, published, f"{type(error).__name__}: {error}") from error
        if channels % 48 or heads < 1 or width % heads:  # 8 heads at half the width, and 3 parts of a position
            raise _other(path, published, f"{channels} channels of prompts, {heads} heads for {width} channels")
        return cls(width, depth, heads, unwindowed, channels, cells * patch, patch)


def _other(path: Path, published: str, found: str) -> WeightsError:
    return WeightsError(
        f"{path}: these weights are of another architecture than SAM-Med3D ({found}); accepted is {published}"
    )


def _build(sizes: Architecture) -> nn.Module:
    with warnings.catch_warnings():  # the package imports requests, which adds filters of its own
        from medim.models.sam_med3d import build_sam3D_vit_b_ori
    with torch.random.fork_rng(devices=[]):  # initial weights must not move the caller's random state
        network: nn.Module = build_sam3D_vit_b_ori(
            pretrained=False,  # its own way to weights downloads and unpickles
            encoder_embed_dim=sizes.width,
            encoder_depth=sizes.depth,
            encoder_num_heads=sizes.heads,
            encoder_global_attn_indexes=list(sizes.unwindowed),
            prompt_embed_dim=sizes.channels,
            image_size=sizes.side,
            vit_patch_size=sizes.patch,
        )
    return network
