"""SAM 2 and MedSAM2: promptable models that treat a scan as a video and carry prompts from slice to slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semisam_core.errors import WeightsError
from semisam_core.generalists.base import GeneralistCard, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.cards import MEDSAM2, SAM2
from semisam_core.generalists.sam2_network import STRIDE, build_network, published_config
from semisam_core.generalists.sam2_track import Answer, Features, Track
from semisam_core.generalists.sam_queries import Query, answered_slices, make_queries
from semisam_core.generalists.slices import Framing, encode_slices
from semisam_core.generalists.weights import load_into, load_verified_state

SIDES = {SAM2.name: 1024, MEDSAM2.name: 512}  # pixels along each side of the input in training
_MASK_STRIDE = 4  # pixels of the input per pixel of a mask prompt, along each side
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red, green, blue, in 0..1


class Sam2:
    """A frozen SAM 2 or MedSAM2. Its embedding units are slices along the last axis.

    An embedding has the three levels of features that the tracker needs, (32, s/4, s/4), (64, s/8, s/8) and
    (256, s/16, s/16) for an input of s x s pixels, concatenated to one tensor of 4 s^2 numbers. In half precision that
    is 8.4 MB per slice for SAM 2 (s = 1024) and 2.1 MB for MedSAM2 (s = 512).
    """

    def __init__(
        self, card: GeneralistCard, network: Any, weights_sha256: str, device: torch.device, batch_size: int
    ) -> None:
        """Wrap a network that is loaded, frozen and on its device; see `load`.

        Args:
            card: SAM 2's or MedSAM2's.
            network: the package's `SAM2VideoPredictor`.
            weights_sha256: SHA-256 of its weights file.
            device: the network's device.
            batch_size: slices encoded at a time. Prompts are answered one by one.

        Raises:
            ValueError: the batch size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.network = network
        self.framing = Framing(network.image_size, stretched=True)
        self.card = card
        self.weights_sha256 = weights_sha256
        self._device = device
        self._batch_size = batch_size
        width, tokens = network.hidden_dim, network.image_size // STRIDE
        self._levels = ((width // 8, 4 * tokens), (width // 4, 2 * tokens), (width, tokens))  # (channels, side)

    @classmethod
    def load(
        cls,
        card: GeneralistCard,
        device: torch.device,
        weights: Path | None,
        sha256: str | None = None,
        *,
        config: Path | None = None,
        side: int | None = None,
        batch_size: int | None = None,
    ) -> Sam2:
        """Build the network that fits a checkpoint and load its verified weights.

        Args:
            card: SAM 2's or MedSAM2's.
            device: where to run: float32 on a CPU; bfloat16, as in training, on a GPU that supports it.
            weights: a checkpoint in the layout of the published ones, SAM 2 or 2.1, of any size.
            sha256: the hash that the file must have; None accepts any.
            config: a configuration file in the package's format; None for the published one that fits the checkpoint.
            side: pixels along each side of the input, a multiple of 32; None for the side used in training.
            batch_size: slices encoded at a time; None for 4 on a GPU and 1 on a CPU.

        Raises:
            WeightsError: the weights are missing, altered or do not fit the architecture.
        """
        published = f"{card.source} ({card.licence})"
        if weights is None:
            raise WeightsError(f"no Python package ships the weights of {card.name}; accepted is {published}")
        state, found = load_verified_state(weights, sha256, published, torch.device("cpu"))
        chosen = config or published_config(state)
        if chosen is None:
            raise WeightsError(
                f"{weights}: these weights do not fit SAM 2 in a published size (Hiera tiny, small, base+ or large); "
                f"accepted is {published}"
            )
        network = build_network(chosen, side or SIDES[card.name])
        load_into(network, state, weights, published)
        network.eval().requires_grad_(False).to(device)
        if batch_size is None:
            batch_size = 4 if device.type == "cuda" else 1
        return cls(card, network, found, device, batch_size)

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the slices that have a box, a positive point or mask foreground and, if there are any, the whole span.

        Raises:
            ValueError: as `segment`.
        """
        self._check(prompts, grid)
        prompted = answered_slices(prompts, grid, self.framing)
        if not prompted or prompts.span is None:
            return prompted
        first, last = prompts.span
        return tuple(sorted({*prompted, *range(first, last + 1)}))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode slices of a scan.

        Args:
            volume: (H, W, D), in any intensity unit.
            grid: the scan's voxels.
            units: slice numbers in 0..D-1.

        Returns:
            slice -> (4 s^2,) float32 on the CPU.

        Raises:
            ValueError: the scan is not 3D, a slice lies outside it, or its intensities are not finite.
        """
        return encode_slices(
            volume, units, self._batch_size, lambda chunk, limits: self._encode(self.frames(volume, chunk, limits))
        )

    def frames(self, volume: Tensor, units: Sequence[int], limits: tuple[float, float]) -> Tensor:
        """Prepare slices of a scan as frames of one video, all scaled alike.

        Args:
            volume: (H, W, D), in any intensity unit.
            units: N slice numbers.
            limits: intensities to clip at, see `intensity_limits`; they map to 0 and 1.

        Returns:
            (N, 3, s, s), normalised with ImageNet's mean and standard deviation.
        """
        low, high = limits
        slices = torch.stack([volume[:, :, unit] for unit in units]).float().cpu().clamp(low, high)  # (N, H, W)
        scaled = (slices - low) / (high - low if high > low else 1.0)
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (_MEAN, _STD))
        return (self.framing.frames(scaled)[:, None] - mean) / std

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Segment what the prompts point at; see `make_queries` for how prompts on one slice are combined.

        Without a span, each prompted slice is answered on its own. With a span, the prompted slices go into the memory
        and the target is tracked from the lowest of them upwards, then downwards. Several boxes on a slice are separate
        targets, tracked separately: the first boxes of all slices, counted from the upper left, are one target, the
        second boxes another. A slice takes their highest probability. Nothing is kept between calls.

        Args:
            embeddings: slice -> (4 s^2,), for every slice in `units(prompts, grid)`.
            prompts: in voxels of the scan, of the kinds that the card declares. A prompted slice outside the span
                contributes to the memory but is not answered.
            grid: the scan's voxels.

        Returns:
            Probability (H, W, D) and quality of each answered slice (the mean over its targets), both on the CPU. The
            quality is the predicted IoU; the probability that there is no target, if the model sees none; 1 if the
            answer is a mask that was given.

        Raises:
            ValueError: a prompt is of another kind, outside the scan, empty, not finite or not on a slice; the mask is
                not a probability of the scan's shape; the span is not within the scan; or a slice has no embedding.
        """
        if missing := sorted(set(self.units(prompts, grid)) - set(embeddings)):
            raise ValueError(f"no embedding for the slices {missing}; embed units(prompts) first")
        mask_side = self.framing.side // (_MASK_STRIDE if prompts.span is None else 1)
        queries = make_queries(prompts, grid, self.framing, mask_side)
        probability = torch.zeros(grid.shape)  # (H, W, D)
        qualities: dict[int, list[float]] = {}
        with self._precision():
            for index, answer in self._answers(queries, embeddings, prompts.span):
                found = torch.sigmoid(self.framing.unframe(answer.logits.float(), grid.shape[:2]))[0].cpu()
                probability[:, :, index] = torch.maximum(probability[:, :, index], found)
                qualities.setdefault(index, []).append(answer.quality)
        quality = {index: sum(each) / len(each) for index, each in sorted(qualities.items())}
        return Segmentation(probability, quality)

    def _answers(
        self, queries: Sequence[Query], embeddings: Mapping[int, Tensor], span: tuple[int, int] | None
    ) -> Iterator[tuple[int, Answer]]:
        features = partial(self._features, embeddings)
        if span is None:
            for query in queries:
                yield query.index, Track(self.network, features, first=query.index, length=1).prompt(query)
            return
        for target in _targets(queries):
            yield from self._tracked(target, features, span)

    def _tracked(
        self, target: Mapping[int, Query], features: partial[Features], span: tuple[int, int]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield a target's answers within the span.

        Args:
            target: slice -> the query there, at least one.
            features: slice -> its features.
            span: first and last slice to answer.
        """
        first, last = span
        start, lowest, highest = min(target), min(first, *target), max(last, *target)
        track = Track(self.network, features, lowest, highest - lowest + 1)
        for index, query in target.items():
            answer = track.prompt(query)
            if first <= index <= last:
                yield index, answer
        for index in range(max(start + 1, first), last + 1):
            if index not in target:
                yield index, track.carry(index, reverse=False)
        track.turn_back()
        for index in range(min(start - 1, last), first - 1, -1):
            yield index, track.carry(index, reverse=True)

    def _features(self, embeddings: Mapping[int, Tensor], index: int) -> Features:
        """Return an embedding's levels on the device. The positional encoding depends on shapes alone: not stored."""
        sizes = [channels * side * side for channels, side in self._levels]
        parts = torch.split(embeddings[index].to(self._device, torch.float32), sizes)
        maps = [part.view(1, channels, side, side) for part, (channels, side) in zip(parts, self._levels, strict=True)]
        position = self.network.image_encoder.neck.position_encoding(maps[-1])
        return Features([_tokens(each) for each in maps], _tokens(position), [(side, side) for _, side in self._levels])

    @torch.inference_mode()
    def _encode(self, frames: Tensor) -> Tensor:
        """Map frames (B, 3, s, s) to embeddings (B, 4 s^2), float32 on the CPU."""
        with self._precision():
            levels = self.network.forward_image(frames.to(self._device))["backbone_fpn"]
        return torch.cat([level.float().flatten(1) for level in levels], dim=1).cpu()

    def _precision(self) -> torch.autocast:
        """Return bfloat16, as in SAM 2's training, on a GPU that supports it, and otherwise full precision."""
        supported = self._device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(self._device.type, torch.bfloat16, enabled=supported)

    def _check(self, prompts: Prompts, grid: VolumeGrid) -> None:
        prompts.refuse_kinds_beyond(self.card)
        depth = grid.shape[2]
        if prompts.span is not None and not 0 <= prompts.span[0] <= prompts.span[1] < depth:
            raise ValueError(
                f"the span {prompts.span} is not within this scan, which has slices 0 to {depth - 1}; "
                "accepted is (first, last), both included"
            )


def _targets(queries: Sequence[Query]) -> list[dict[int, Query]]:
    """Group queries into targets with at most one query per slice: the n-th queries of all slices are one target."""
    targets: list[dict[int, Query]] = []
    for query in queries:
        fitting = next((target for target in targets if query.index not in target), None)
        if fitting is None:
            targets.append(fitting := {})
        fitting[query.index] = query
    return targets


def _tokens(maps: Tensor) -> Tensor:
    """Reshape maps (1, channels, rows, columns) to tokens (rows * columns, 1, channels)."""
    return maps.flatten(2).permute(2, 0, 1)


def load(card: GeneralistCard, device: torch.device, weights: Path | None, sha256: str | None) -> Sam2:
    """Load the model for the registry; see `Sam2.load`."""
    return Sam2.load(card, device, weights, sha256)
