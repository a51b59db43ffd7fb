"""SAM and MedSAM: one 2D promptable architecture (ViT encoder) with two sets of weights and two preprocessings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semisam_core.errors import WeightsError
from semisam_core.generalists.base import GeneralistCard, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.cards import MEDSAM, SAM
from semisam_core.generalists.sam_network import build_network
from semisam_core.generalists.sam_queries import Query, answered_slices, make_queries
from semisam_core.generalists.slices import Framing, chunks, encode_slices, stretch
from semisam_core.generalists.weights import load_verified_state

_PIXEL_MEAN = (123.675, 116.28, 103.53)  # of SAM's training images, red, green, blue, in 0..255
_PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Preparation:
    """How a slice becomes an image of the kind that the encoder was trained on.

    Attributes:
        stretched: whether the image fills the encoder's square; otherwise the slice keeps its proportions.
        to_images: (slices (N, H, W), how they map to the encoder's input) -> images (N, 3, rows, columns), not yet
            padded.
    """

    stretched: bool
    to_images: Callable[[Tensor, Framing], Tensor]


def sam_images(slices: Tensor, framing: Framing) -> Tensor:
    """Prepare slices as in SAM's training: each scaled to 0..255, resized, three equal channels, normalised."""
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (_PIXEL_MEAN, _PIXEL_STD))
    return (framing.frames(255 * stretch(slices))[:, None] - mean) / std


def medsam_images(slices: Tensor, framing: Framing) -> Tensor:
    """Prepare slices as in MedSAM's training: resized, each scaled to 0..1, three equal channels."""
    return stretch(framing.frames(slices))[:, None].expand(-1, 3, -1, -1)


PREPARATIONS = {
    SAM.name: Preparation(stretched=False, to_images=sam_images),
    MEDSAM.name: Preparation(stretched=True, to_images=medsam_images),
}


class Sam:
    """A frozen SAM or MedSAM. Its embedding units are slices along the last axis.

    An embedding is (256, 64, 64) in the published sizes. Slices do not influence each other, nor do prompts on
    different slices; batches only make it faster.
    """

    def __init__(
        self,
        card: GeneralistCard,
        network: Any,
        weights_sha256: str,
        device: torch.device,
        batch_size: int,
    ) -> None:
        """Wrap a network that is loaded, frozen and on its device; see `load`.

        Args:
            card: SAM's or MedSAM's.
            network: SAM with `image_encoder`, `prompt_encoder` and `mask_decoder`.
            weights_sha256: SHA-256 of its weights file.
            device: the network's device.
            batch_size: slices encoded, or prompts decoded, at a time.

        Raises:
            ValueError: the card is of another model, or the batch size is below 1.
        """
        if card.name not in PREPARATIONS:
            raise ValueError(f"no preprocessing is known for {card.name}; accepted are {', '.join(PREPARATIONS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.network = network
        self.card = card
        self.weights_sha256 = weights_sha256
        self._device = device
        self._batch_size = batch_size
        self._preparation = PREPARATIONS[card.name]
        self.framing = Framing(network.image_encoder.img_size, self._preparation.stretched)

    @classmethod
    def load(
        cls,
        card: GeneralistCard,
        device: torch.device,
        weights: Path | None,
        sha256: str | None = None,
        batch_size: int | None = None,
    ) -> Sam:
        """Build the network that fits a checkpoint and load its verified weights.

        Args:
            card: SAM's or MedSAM's.
            device: where to run: float32 on a CPU; on a GPU the encoder runs in half precision.
            weights: a checkpoint in the layout of SAM's published ones, of any size.
            sha256: the hash that the file must have; None accepts any.
            batch_size: slices or prompts at a time; None for 8 on a GPU and 1 on a CPU.

        Raises:
            WeightsError: the weights are missing, altered or do not fit the architecture.
        """
        published = f"{card.source} ({card.licence})"
        if weights is None:
            raise WeightsError(f"no Python package ships the weights of {card.name}; accepted is {published}")
        state, found = load_verified_state(weights, sha256, published, torch.device("cpu"))
        network = build_network(state, weights, published)
        network.eval().requires_grad_(False).to(device)
        if batch_size is None:
            batch_size = 8 if device.type == "cuda" else 1
        return cls(card, network, found, device, batch_size)

    def feature_map(self, embedding: Tensor) -> Tensor:
        """Return the features of one slice, (256, 64, 64) in the published sizes."""
        return embedding

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the slices that have a box, a positive point or mask foreground, in ascending order.

        Raises:
            ValueError: as `segment`.
        """
        prompts.refuse_kinds_beyond(self.card)
        return answered_slices(prompts, grid, self.framing)

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
            volume, units, self._batch_size, lambda chunk, limits: self._encode(self.frames(volume, chunk, limits))
        )

    def frames(self, volume: Tensor, units: Sequence[int], limits: tuple[float, float]) -> Tensor:
        """Prepare slices of a scan as in the encoder's training.

        Args:
            volume: (H, W, D), in any intensity unit.
            units: N slice numbers.
            limits: intensities to clip at, see `intensity_limits`.

        Returns:
            (N, 3, side, side), padded with zeros.
        """
        slices = torch.stack([volume[:, :, unit] for unit in units]).float().cpu().clamp(*limits)  # (N, H, W)
        return self.framing.pad(self._preparation.to_images(slices, self.framing))

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Segment what the prompts point at; see `make_queries` for how prompts on one slice are combined.

        A single point is ambiguous: the network then gives several answers and the one that it rates highest is used,
        as SAM's authors advise. Each box on a slice is answered separately; the slice takes their highest probability.

        Args:
            embeddings: slice -> (256, 64, 64), for every slice in `units(prompts, grid)`.
            prompts: in voxels of the scan, of the kinds that the card declares.
            grid: the scan's voxels.

        Returns:
            Probability (H, W, D) and predicted IoU of each slice (the mean over its boxes), both on the CPU.

        Raises:
            ValueError: a prompt is of another kind, outside the scan, empty, not finite or not on a slice; the mask is
                not a probability of the scan's shape; or a prompted slice has no embedding.
        """
        prompts.refuse_kinds_beyond(self.card)
        queries = make_queries(prompts, grid, self.framing, self.network.prompt_encoder.mask_input_size[0])
        if missing := sorted({query.index for query in queries} - set(embeddings)):
            raise ValueError(f"no embedding for the prompted slices {missing}; embed units(prompts) first")
        probability = torch.zeros(grid.shape)  # (H, W, D)
        overlaps: dict[int, list[float]] = {}
        for chunk in self._batches(queries):
            chosen = torch.stack([embeddings[query.index] for query in chunk])
            maps, predicted = self._decode(chosen, chunk, grid.shape[:2])
            for query, each, overlap in zip(chunk, maps, predicted.tolist(), strict=True):
                probability[:, :, query.index] = torch.maximum(probability[:, :, query.index], each)
                overlaps.setdefault(query.index, []).append(min(max(overlap, 0.0), 1.0))
        quality = {index: sum(each) / len(each) for index, each in sorted(overlaps.items())}
        return Segmentation(probability, quality)

    def _batches(self, queries: Sequence[Query]) -> list[list[Query]]:
        """Split queries into batches of equal structure."""
        groups: dict[tuple[bool, int, bool], list[Query]] = {}
        for query in queries:
            groups.setdefault(query.structure, []).append(query)
        return [
            [group[position] for position in chunk]
            for group in groups.values()
            for chunk in chunks(range(len(group)), self._batch_size)
        ]

    @torch.inference_mode()
    def _encode(self, frames: Tensor) -> Tensor:
        """Map frames (B, 3, side, side) to embeddings (B, 256, 64, 64), float32 on the CPU."""
        with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
            encoded: Tensor = self.network.image_encoder(frames.to(self._device))
        return encoded.float().cpu()

    @torch.inference_mode()
    def _decode(self, embeddings: Tensor, queries: Sequence[Query], plane: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Map embeddings (B, 256, 64, 64) and B queries of one structure to probability (B, H, W) and IoU (B,)."""
        embeddings = embeddings.to(self._device, torch.float32)
        sparse, dense = self._encode_prompts(queries)
        logits, overlap = self.network.mask_decoder(  # (B, M, 256, 256), (B, M)
            # The decoder repeats one image for all prompts and adds their dense embeddings to it. Adding the image to
            # the dense embedding instead gives each prompt of a batch its own image.
            image_embeddings=torch.zeros_like(embeddings[:1]),
            image_pe=self.network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=embeddings + dense,
            multimask_output=queries[0].ambiguous,
        )
        overlap, best = overlap.float().max(dim=1)
        logits = logits[torch.arange(len(queries), device=best.device), best].float()  # (B, 256, 256)
        return torch.sigmoid(self.framing.unframe(logits, plane)).cpu(), overlap.cpu()

    def _encode_prompts(self, queries: Sequence[Query]) -> tuple[Tensor, Tensor]:
        """Map B queries of one structure to sparse (B, tokens, 256) and dense (B, 256, 64, 64) embeddings."""
        has_box, point_count, _ = queries[0].structure
        points = boxes = None
        # The prompt encoder adds half a pixel to coordinates.
        if point_count:
            coordinates = torch.tensor([query.points for query in queries], device=self._device) - 0.5  # (B, P, 2)
            points = coordinates, torch.tensor([query.labels for query in queries], device=self._device)
        if has_box:
            boxes = torch.tensor([query.box for query in queries], device=self._device) - 0.5  # (B, 4)
        masks = [query.mask for query in queries if query.mask is not None]
        sparse, dense = self.network.prompt_encoder(
            points=points, boxes=boxes, masks=torch.stack(masks).to(self._device) if masks else None
        )
        return sparse, dense


def load(card: GeneralistCard, device: torch.device, weights: Path | None, sha256: str | None) -> Sam:
    """Load the model for the registry; see `Sam.load`."""
    return Sam.load(card, device, weights, sha256)
