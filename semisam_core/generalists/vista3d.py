"""VISTA3D: a 3D promptable model for CT that takes clicks. Only its interactive, class-agnostic branch is used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import SegResNetDS2
from monai.networks.nets.vista3d import VISTA3D as Network
from monai.networks.nets.vista3d import ClassMappingClassify, PointMappingSAM
from torch import Tensor, nn

from semisam_core.errors import WeightsError
from semisam_core.generalists.base import GeneralistCard, Prompts, Segmentation, VolumeGrid
from semisam_core.generalists.cards import VISTA3D
from semisam_core.generalists.crops import CropLattice, CropPrompts, crop_prompts
from semisam_core.generalists.slices import intensity_limits
from semisam_core.generalists.weights import load_into, load_verified_state

SIDE = 128  # voxels along each edge of the patches that it was trained on
SPACING_MM = 1.5
PUBLISHED = f"{VISTA3D.source} ({VISTA3D.licence})"

_LAST_SUPPORTED = 132  # the last class that it was trained on; cannot be inferred from the tensors
_NOVEL_CLASS = _LAST_SUPPORTED + 1
_WIDTH_STEP = 8  # four heads share half of the channels, and a position is a sine and a cosine
_STEM = "image_encoder.encoder.conv_init.weight"
_CLASSES = "point_head.class_embeddings.weight"
_BLOCK = re.compile(r"image_encoder\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.conv1\.weight")


class PointBranch(nn.Module):
    """VISTA3D's interactive branch, split where what depends on the image alone is smallest.

    The image decoder has skip connections at all resolutions, so the earliest tensor that represents the image is its
    output: (48, 128, 128, 128), 403 MB in single precision. The point head reads it through a convolutional block of
    stride 2 that does not depend on the clicks. The output of that block, (48, 64, 64, 64), takes 50 MB; only the
    layers after it depend on the clicks.
    """

    def __init__(self, network: nn.Module) -> None:
        """Take a VISTA3D apart and drop its automatic branch.

        Args:
            network: MONAI's, with `image_encoder` and `point_head`; must not be used afterwards.
        """
        super().__init__()
        parts: Any = network
        self.image_encoder = parts.image_encoder
        self.image_encoder.up_layers_auto = nn.ModuleList()
        self.reduction = parts.point_head.feat_downsample
        self.point_head = parts.point_head
        self.point_head.feat_downsample = nn.Identity()

    @property
    def divisor(self) -> int:
        """What the edge of a cube must be divisible by so that its coarsest features have an even side."""
        return int(2 * max(self.image_encoder.shape_factor()))

    def encode(self, cubes: Tensor) -> Tensor:
        """Map cubes (1, 1, S, S, S) in 0..1 to embeddings (1, C, S/2, S/2, S/2)."""
        features, _ = self.image_encoder(cubes, with_point=True, with_label=False)
        encoded: Tensor = self.reduction(features)
        return encoded

    def decode(self, encoded: Tensor, positions: Tensor, positive: Tensor) -> Tensor:
        """Answer the clicks on one object, treated as a class that the model was not trained on.

        Args:
            encoded: (1, C, S/2, S/2, S/2).
            positions: (1, N, 3) in voxels of the cube; whole numbers are voxel centres.
            positive: (1, N) bool.

        Returns:
            Logits (1, 1, S, S, S).
        """
        # The head takes positions on the grid of its input, which has half the cube's side.
        halved = (positions + 0.5) / 2 - 0.5
        novel = torch.tensor([_NOVEL_CLASS], device=encoded.device)
        logits: Tensor = self.point_head(encoded, halved, positive.long(), class_vector=novel)
        return logits


class Vista3D:
    """A frozen VISTA3D, prompted by positive and negative clicks. Its embedding units are cubes of `CropLattice`.

    The scan is resampled to 1.5 mm and cut into cubes of 128 voxels, axes along R, A, S, as published. There is one
    deviation: VISTA3D maps -964 to 1054 Hounsfield units to 0..1, but scans arrive already normalised by the study plan
    (a window, or zero mean and unit variance), which cannot be undone. Instead, the scan's own 0.5 and 99.5 percentiles
    map to 0 and 1. The contrast of CT then differs from the training data's, and answers may be worse. For MR, which it
    was not trained on, there is no published scale.

    An embedding is (48, 64, 64, 64) per cube: 50 MB, or 25 MB in the half precision of the embedding store. It contains
    everything that depends on the image alone, so clicks never need another encoding. On a CPU, encoding takes about
    seven times as long as answering (41 s and 6 s on one core), and each needs some 2 GB of memory beside the weights.

    VISTA3D does not predict its overlap with the truth. The quality reported instead is the mean probability of a
    cube's foreground (above 0.5), or 0 if there is none: it tells how certain the model is of what it marked, not
    whether it marked everything.
    """

    def __init__(self, network: PointBranch, weights_sha256: str, device: torch.device, side: int = SIDE) -> None:
        """Wrap a network that is loaded, frozen and on its device; see `load`.

        Args:
            network: the interactive branch.
            weights_sha256: SHA-256 of its weights file.
            device: the network's device.
            side: voxels along each edge of a cube.

        Raises:
            ValueError: the network cannot take cubes of this side.
        """
        if side < 1 or side % network.divisor:
            raise ValueError(f"cubes must have a side divisible by {network.divisor}, not {side}")
        self.network = network
        self.card = VISTA3D
        self.weights_sha256 = weights_sha256
        self._device = device
        self._side = side

    @classmethod
    def load(cls, device: torch.device, weights: Path | None, sha256: str | None = None, side: int = SIDE) -> Vista3D:
        """Build the network that fits a checkpoint and load its verified weights.

        Args:
            device: where to run: float32 on a CPU; on a GPU the encoder runs in half precision.
            weights: a checkpoint in the layout of MONAI 1.4 and later, of any size.
            sha256: the hash that the file must have; None accepts any.
            side: voxels along each edge of a cube.

        Raises:
            WeightsError: the weights are missing, altered or do not fit the architecture.
        """
        if weights is None:
            raise WeightsError(f"no Python package ships the weights of {VISTA3D.name}; accepted is {PUBLISHED}")
        state, found = load_verified_state(weights, sha256, PUBLISHED, torch.device("cpu"))
        network = PointBranch(build_network(state, weights))
        network.eval().requires_grad_(False).to(device)
        return cls(network, found, device, side)

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        """Return the crops that answer these clicks, in ascending order; none without a positive click.

        Raises:
            ValueError: as `segment`.
        """
        prompts.refuse_kinds_beyond(self.card)
        return tuple(crop_prompts(self._lattice(grid), prompts))

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode crops of a scan.

        Args:
            volume: (H, W, D) along R, A, S, in any intensity unit.
            grid: the scan's voxels.
            units: crop numbers.

        Returns:
            crop -> (48, 64, 64, 64) float32 on the CPU.

        Raises:
            ValueError: the scan has another shape than the grid, has no such crop, or is not finite.
        """
        if tuple(volume.shape) != grid.shape:
            raise ValueError(f"the scan has shape {tuple(volume.shape)}, its grid {grid.shape}; they must be equal")
        lattice = self._lattice(grid)
        resampled = stretch_between(lattice.resample(volume.cpu()), intensity_limits(volume))
        # A clone made outside inference mode is an ordinary tensor.
        return {unit: self._encode(lattice.cut(resampled, unit)).clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        """Segment the object that the clicks mark.

        Each crop answers the clicks inside it. A crop without a positive one is left out; where crops overlap, their
        probabilities are averaged.

        Args:
            embeddings: crop -> (48, 64, 64, 64), for every crop in `units(prompts, grid)`.
            prompts: positive and negative clicks on one object, in voxels of the scan.
            grid: the scan's voxels.

        Returns:
            Probability (H, W, D) on the CPU, and the mean foreground probability of each crop as its quality.

        Raises:
            ValueError: a prompt is not a click or is outside the scan, or a prompted crop has no embedding.
        """
        prompts.refuse_kinds_beyond(self.card)
        lattice = self._lattice(grid)
        clicks = crop_prompts(lattice, prompts)
        if missing := sorted(set(clicks) - set(embeddings)):
            raise ValueError(f"no embedding for the prompted crops {missing}; embed units(prompts) first")
        cubes = {unit: self._decode(embeddings[unit], each) for unit, each in clicks.items()}
        scan = torch.ones(lattice.size)
        quality = {unit: confidence(cube[lattice.cut(scan, unit) > 0]) for unit, cube in cubes.items()}
        return Segmentation(lattice.restore(cubes), quality)

    def _lattice(self, grid: VolumeGrid) -> CropLattice:
        return CropLattice(grid, self._side, SPACING_MM)

    @torch.inference_mode()
    def _encode(self, cube: Tensor) -> Tensor:
        """Map a cube (S, S, S) in 0..1 to its embedding (C, S/2, S/2, S/2), float32 on the CPU."""
        with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
            encoded = self.network.encode(cube[None, None].to(self._device))
        return encoded[0].float().cpu()

    @torch.inference_mode()
    def _decode(self, embedding: Tensor, clicks: CropPrompts) -> Tensor:
        """Map the embedding of a cube and the clicks in it to foreground probability (S, S, S) on the CPU."""
        logits = self.network.decode(
            embedding[None].to(self._device, torch.float32),
            torch.tensor([clicks.positions], device=self._device),
            torch.tensor([clicks.positive], device=self._device),
        )
        return torch.sigmoid(logits[0, 0].float()).cpu()


@dataclass(frozen=True)
class Architecture:
    """The sizes in which VISTA3D's variants differ.

    Attributes:
        width: channels at full resolution.
        blocks: residual blocks of the encoder at each resolution, finest first.
        classes: rows of the class embeddings.
    """

    width: int
    blocks: tuple[int, ...]
    classes: int


def read_architecture(state: Mapping[str, Tensor], path: Path) -> Architecture:
    """Infer the sizes of a VISTA3D from the names and shapes of its tensors.

    Args:
        state: name -> tensor, named as by MONAI 1.4 and later.
        path: the checkpoint, for error messages.

    Raises:
        WeightsError: the tensors are not in VISTA3D's layout.
    """
    counted: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, state)):
        counted[int(match[1])] = counted.get(int(match[1]), 0) + 1
    missing = [name for name in (_STEM, _CLASSES) if name not in state]
    if missing or len(counted) < 2 or sorted(counted) != list(range(len(counted))):
        what = f"{missing[0]} is missing" if missing else "its encoder has fewer than two resolutions"
        raise _refusal(path, what)
    stem = tuple(state[_STEM].shape)
    if len(stem) != 5 or stem[1] != 1 or stem[0] % _WIDTH_STEP or not stem[0]:
        raise _refusal(path, f"its first layer is {stem}, not 3D from one channel to a multiple of {_WIDTH_STEP}")
    return Architecture(stem[0], tuple(counted[level] for level in sorted(counted)), len(state[_CLASSES]))


def build_network(state: dict[str, Tensor], path: Path) -> nn.Module:
    """Build the VISTA3D that fits these tensors and load them, on the CPU in float32.

    Raises:
        WeightsError: the tensors are not in VISTA3D's layout, or one is missing or unexpected.
    """
    sizes = read_architecture(state, path)
    with torch.random.fork_rng(devices=[]):  # random initial weights must not change the caller's random state
        network: nn.Module = Network(
            image_encoder=SegResNetDS2(
                blocks_down=sizes.blocks,
                norm="instance",
                out_channels=sizes.width,
                init_filters=sizes.width,
            ),
            class_head=ClassMappingClassify(sizes.classes, sizes.width),
            point_head=PointMappingSAM(sizes.width, n_classes=sizes.classes, last_supported=_LAST_SUPPORTED),
        )
    load_into(network, state, path, PUBLISHED)
    return network


def stretch_between(volume: Tensor, limits: tuple[float, float]) -> Tensor:
    """Map the range between two limits to 0..1 and clip; 0 everywhere if the limits are equal."""
    low, high = limits
    if high <= low:
        return torch.zeros_like(volume)
    return ((volume - low) / (high - low)).clamp(0, 1)


def confidence(probability: Tensor) -> float:
    """Return the mean of the probabilities above 0.5, or 0 if there are none."""
    foreground = probability[probability > 0.5]
    return float(foreground.double().mean()) if foreground.numel() else 0.0


def load(card: GeneralistCard, device: torch.device, weights: Path | None, sha256: str | None) -> Vista3D:
    """Load the model for the registry; see `Vista3D.load`."""
    return Vista3D.load(device, weights, sha256)


def _refusal(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path}: these weights do not fit {VISTA3D.name}: {reason}; accepted is {PUBLISHED}")
