"""SAM-Med3D and its derivatives: 3D promptable models that take clicks and a mask in cubes of 1.5 mm voxels."""

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

_LOW_RESOLUTION = 4  # voxels of a cube per voxel of the decoder's masks, along each edge
_LEAST = 1e-4  # probabilities of a mask prompt are clamped this far from 0 and 1: logits stay within -9.2 to 9.2


class SamMed3D:
    """A frozen SAM-Med3D (3D ViT encoder, SAM decoder). Its embedding units are cubes of `CropLattice`.

    An embedding is (384, 8, 8, 8). Scans are in RAS axis order, as in the published inference. The published training
    did not train the predicted IoU, so its quality is not meaningful.
    """

    def __init__(self, card: GeneralistCard, network: Any, weights_sha256: str, device: torch.device) -> None:
        """Wrap a network that is loaded, frozen and on its device; see `load`.

        Args:
            card: which of the models this is.
            network: with `image_encoder`, `prompt_encoder` and `mask_decoder`.
            weights_sha256: SHA-256 of its weights file.
            device: the network's device.
        """
        self.network = network
        self.card = card
        self.weights_sha256 = weights_sha256
        self._device = device
        self._side = int(network.image_encoder.img_size)

    @classmethod
    def load(cls, card: GeneralistCard, device: torch.device, weights: Path, sha256: str | None = None) -> SamMed3D:
        """Load verified weights and build the network that fits them.

        Args:
            card: which of the models this is.
            device: where to run: float32 on a CPU; on a GPU the encoder runs in half precision.
            weights: a checkpoint in the published layout, {"model_state_dict": tensors}.
            sha256: the hash that the file must have, in hexadecimal; None accepts any.

        Raises:
            WeightsError: the weights are missing, altered or do not fit the architecture.
        """
        published = f"{card.source} ({card.licence})"
        # The published checkpoints also hold the training script's command-line arguments: plain values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state, found = load_verified_state(weights, sha256, published, torch.device("cpu"))
        network = _build(Architecture.of(state, weights, published))
        load_into(network, state, weights, published)
        network.eval().requires_grad_(False)
        network.to(device)
        return cls(card, network, found, device)

    def lattice(self, grid: VolumeGrid) -> CropLattice:
        """Return the cubes into which it cuts a scan."""
        return CropLattice(grid, self._side)

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the cubes that cover the clicks and the mask's foreground; see `crop_prompts`.

        Raises:
            ValueError: a click is outside the scan, or the mask has another shape.
        """
        return tuple(crop_prompts(self.lattice(grid), prompts))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode cubes of a scan.

        Args:
            volume: (H, W, D) in RAS axis order, in any intensity unit; the darkest voxels are taken as background.
            grid: the scan's voxels.
            units: cubes of the scan.

        Returns:
            cube -> (384, 8, 8, 8) float32 on the CPU.

        Raises:
            ValueError: the scan has another shape than the grid, is not finite, or has no such cube.
        """
        if tuple(volume.shape) != grid.shape:
            raise ValueError(f"the scan has shape {tuple(volume.shape)}, its grid {grid.shape}; they must be equal")
        lattice = self.lattice(grid)
        for unit in units:
            lattice.origin(unit)
        if not bool(torch.isfinite(volume).all()):
            raise ValueError("the scan has intensities that are not finite; replace them before embedding")
        # Background must be exactly 0, as in the scans of the published training, also after interpolation.
        resampled = lattice.resample(volume.float() - volume.min().float())
        # A clone made outside inference mode is an ordinary tensor.
        return {unit: self._encode(standardised(lattice.cut(resampled, unit))).clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Segment what the clicks and the mask point at. Where cubes overlap, their probabilities are averaged.

        Without a mask, the network gets an empty one (logits of 0), as for the first click in training. To refine an
        answer, pass it as the mask.

        Args:
            embeddings: cube -> (384, 8, 8, 8), for every cube in `units`.
            prompts: clicks in voxels of the scan, and the mask.
            grid: the scan's voxels.

        Returns:
            Probability (H, W, D) and predicted IoU of each cube, both on the CPU.

        Raises:
            ValueError: a click is outside the scan, the mask has another shape, or a cube has no embedding.
        """
        lattice = self.lattice(grid)
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

        Clicks are in tensor axis order, as in the published training. The published positional encodings of image and
        clicks differ in the order of their first two axes; the weights were trained that way, so this is kept.
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
        """Return positions (1, N, 3) in whole voxels, to which the prompt encoder adds 0.5, and labels (1, N)."""
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
    """Standardise a cube by the mean and standard deviation of its voxels above 0.

    As published, background and padding, which are 0, do not enter the statistics. A constant cube becomes 0.
    """
    inside = cube[cube > 0]
    if inside.numel() < 2 or not float(inside.std()) > 0:
        return torch.zeros_like(cube)
    return (cube - inside.mean()) / inside.std()


def mask_logits(cube: Tensor) -> Tensor:
    """Map the foreground probability in a cube (S, S, S) to the logits (S/4, S/4, S/4) of a mask prompt.

    Logits are averaged rather than probabilities because the decoder's answers are upsampled as logits.
    """
    return F.avg_pool3d(torch.logit(cube, eps=_LEAST)[None], _LOW_RESOLUTION)[0]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a SAM-Med3D, inferred from its tensors.

    The package with the architecture fixes what cannot be inferred to its published value: windows of 14 and, in the
    decoder, 8 heads, 2 layers and 3 additional masks. Tensors that do not fit these fail to load.

    Attributes:
        width: channels of the encoder.
        depth: blocks of the encoder.
        heads: attention heads of each block.
        unwindowed: the blocks whose attention spans the whole cube.
        channels: channels of embeddings and prompts.
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
        """Infer the sizes from named tensors.

        Raises:
            WeightsError: the tensors do not fit the architecture.
        """
        depth = sum(name.startswith("image_encoder.blocks.") and name.endswith(".attn.rel_pos_d") for name in state)
        try:
            _, cells, _, _, width = state["image_encoder.pos_embed"].shape
            patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
            channels = state["image_encoder.neck.0.weight"].shape[0]
            spans = [tuple(state[f"image_encoder.blocks.{block}.attn.rel_pos_d"].shape) for block in range(depth)]
            heads = width // spans[0][1]
            # A table of relative positions has 2n - 1 rows: n patches along the block's window, or along the cube.
            unwindowed = tuple(block for block, span in enumerate(spans) if span[0] == 2 * cells - 1)
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise _other(path, published, f"{type(error).__name__}: {error}") from error
        if channels % 48 or heads < 1 or width % heads:  # 8 heads of half the width, 3 parts of a position
            raise _other(path, published, f"{channels} prompt channels, {heads} heads for {width} channels")
        return cls(width, depth, heads, unwindowed, channels, cells * patch, patch)


def _other(path: Path, published: str, found: str) -> WeightsError:
    return WeightsError(f"{path}: these weights do not fit SAM-Med3D ({found}); accepted is {published}")


def _build(sizes: Architecture) -> nn.Module:
    with warnings.catch_warnings():  # the package imports requests, which adds warning filters
        from medim.models.sam_med3d import build_sam3D_vit_b_ori
    with torch.random.fork_rng(devices=[]):  # random initial weights must not change the caller's random state
        network: nn.Module = build_sam3D_vit_b_ori(
            pretrained=False,  # the package would download and unpickle weights
            encoder_embed_dim=sizes.width,
            encoder_depth=sizes.depth,
            encoder_num_heads=sizes.heads,
            encoder_global_attn_indexes=list(sizes.unwindowed),
            prompt_embed_dim=sizes.channels,
            image_size=sizes.side,
            vit_patch_size=sizes.patch,
        )
    return network
