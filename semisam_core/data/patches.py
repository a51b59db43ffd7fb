"""Draw training patches in endless, seeded streams: one of labeled scans, one of unlabeled scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
)
from torch import Tensor

from semisam_core.data.places import draw_place
from semisam_core.data.scans import StoredVolume
from semisam_core.plan import Plan
from semisam_core.plan_sections.training import AXES

CARRIED = ("image", "label", "target", "uncertainty")


class ForegroundVoxels(Protocol):
    """Where a target's foreground lies, without the target in memory."""

    @property
    def foreground(self) -> tuple[int, ...]:
        """How many voxels of each class are foreground."""

    def voxels(self, k: int) -> Tensor:
        """Return the foreground voxels (N, 3) of the k-th class, from 1, in array order."""


@dataclass(frozen=True)
class TrainingScan:
    """One scan, as training uses it.

    Attributes:
        image: (C, H, W, D) float32; a stored one is read patch by patch.
        label: (H, W, D) uint8 of class indices; labeled scans only.
        target: pseudo-label y (K, H, W, D) in [0, 1]; None if none was accepted. A stored one is read patch by patch.
        uncertainty: U (K, H, W, D), together with `target`.
        valid: (K,) bool, which classes of `target` were accepted.
        where: the foreground of a stored target.
    """

    image: Tensor | StoredVolume
    label: Tensor | None = None
    target: Tensor | StoredVolume | None = None
    uncertainty: Tensor | StoredVolume | None = None
    valid: Tensor | None = None
    where: ForegroundVoxels | None = None


@dataclass(frozen=True)
class Batch:
    """A batch of patches on the CPU; see `TrainingScan`. `valid` is (B, K)."""

    image: Tensor
    label: Tensor | None
    target: Tensor
    uncertainty: Tensor
    valid: Tensor


class PatchStream:
    """Endless batches of augmented patches: crop, flip, deform, change intensities.

    Each pass visits every scan once, in random order. A foreground patch is centred on a class drawn at random from
    those present in the scan, so that small structures are sampled as often as large ones. The n-th batch depends on
    the seed and n alone.

    Args:
        scans: loads the k-th scan.
        count: number of scans; at least one.
        plan: patch size, augmentation, classes.
        batch_size: patches per batch.
        seed: seed of order and augmentation.

    Raises:
        ValueError: there is no scan.
    """

    def __init__(
        self, scans: Callable[[int], TrainingScan], count: int, plan: Plan, batch_size: int, seed: int
    ) -> None:
        if count < 1:
            raise ValueError("a stream of patches needs at least one scan")
        self._scans, self._count, self._plan, self._batch_size = scans, count, plan, batch_size
        self._random = np.random.RandomState(seed)
        self._order: list[int] = []
        share, patch = plan.data.foreground_share, plan.data.patch
        around = RandCropByPosNegLabeld(CARRIED, "label", patch, pos=share, neg=1 - share, num_samples=1)
        self._around_foreground = _transforms(plan, around)
        self._anywhere = _transforms(plan, RandSpatialCropd(CARRIED, patch, random_size=False))

    def next(self) -> Batch:
        """Return the next batch."""
        return _collate([self._patch(self._scans(self._next_index())) for _ in range(self._batch_size)])

    def _next_index(self) -> int:
        if not self._order:
            self._order = [int(k) for k in self._random.permutation(self._count)]
        return self._order.pop()

    def _patch(self, scan: TrainingScan) -> TrainingScan:
        classes, patch = len(self._plan.task.classes), self._plan.data.patch
        height, width, depth = scan.image.shape[1:]
        foreground = self._foreground(scan, classes)
        transforms = self._around_foreground if len(foreground) else self._anywhere
        transforms.set_random_state(seed=int(self._random.randint(2**31 - 1)))
        place = draw_place((height, width, depth), patch, foreground, transforms.transforms[0])
        blank = torch.zeros((classes, *patch))
        label = None if scan.label is None else place.cut(scan.label[None])
        sample: dict[str, Tensor] = {
            "image": place.cut(scan.image),
            "label": torch.zeros((1, *patch)) if label is None else label.float(),
            "target": blank if scan.target is None else place.cut(scan.target).float(),
            "uncertainty": blank.clone() if scan.uncertainty is None else place.cut(scan.uncertainty).float(),
        }
        found = transforms({name: MetaTensor(value) for name, value in sample.items()}, start=1)
        plain = {name: found[name].as_tensor() for name in CARRIED}
        return TrainingScan(
            image=plain["image"].float(),
            label=None if scan.label is None else plain["label"][0].round().to(torch.uint8),
            target=plain["target"].float().clamp(0, 1),
            uncertainty=plain["uncertainty"].float().clamp_min(0),
            valid=scan.valid if scan.valid is not None else torch.zeros(classes, dtype=torch.bool),
        )

    def _foreground(self, scan: TrainingScan, classes: int) -> Tensor:
        """Return the voxels (N, 3) of one randomly drawn class of the scan, in array order; none if it has no class."""
        if scan.label is not None:
            counts = torch.bincount(scan.label.flatten(), minlength=1 + classes)
            present = [k for k in range(1, 1 + classes) if counts[k]]
        elif scan.where is not None:
            present = [k for k, count in enumerate(scan.where.foreground, start=1) if count]
        elif isinstance(scan.target, Tensor):
            present = [k for k in range(1, 1 + classes) if bool((scan.target[k - 1] > 0.5).any())]
        else:
            present = []
        if not present:
            return torch.zeros((0, 3), dtype=torch.long)
        k = present[int(self._random.randint(len(present))) if len(present) > 1 else 0]
        if scan.label is not None:
            return (scan.label == k).nonzero()
        if scan.where is not None:
            return scan.where.voxels(k)
        return torch.empty((0, 3)) if not isinstance(scan.target, Tensor) else (scan.target[k - 1] > 0.5).nonzero()


def _transforms(plan: Plan, crop: object) -> Compose:
    augment = plan.training.augmentation
    steps: list[object] = [
        crop,  # draws the place only; it is cut out before anything else is done
        *(RandFlipd(CARRIED, prob=augment.flip, spatial_axis=AXES.index(axis)) for axis in augment.flip_axes),
    ]
    if augment.affine_probability > 0:
        angle = float(np.deg2rad(augment.rotation_degrees))
        steps.append(
            RandAffined(
                CARRIED,
                prob=augment.affine_probability,
                rotate_range=(angle / 3, angle / 3, angle),
                scale_range=(augment.scale,) * 3,
                mode=("bilinear", "nearest", "bilinear", "bilinear"),
                padding_mode="border",
            )
        )
    if augment.intensity > 0:
        steps += [
            RandScaleIntensityd("image", factors=augment.intensity, prob=0.5),
            RandShiftIntensityd("image", offsets=augment.intensity, prob=0.5),
            RandAdjustContrastd("image", prob=0.3, gamma=(1 - augment.intensity, 1 + augment.intensity)),
        ]
    if augment.noise > 0:
        steps.append(RandGaussianNoised("image", prob=0.3, std=augment.noise))
    return Compose(steps)


def _collate(patches: Sequence[TrainingScan]) -> Batch:
    def stack(values: Sequence[Tensor | StoredVolume | None]) -> Tensor:
        return torch.stack([value for value in values if isinstance(value, Tensor)])

    labeled = all(patch.label is not None for patch in patches)
    return Batch(
        image=stack([patch.image for patch in patches]),
        label=stack([patch.label for patch in patches]) if labeled else None,
        target=stack([patch.target for patch in patches]),
        uncertainty=stack([patch.uncertainty for patch in patches]),
        valid=stack([patch.valid for patch in patches]),
    )
