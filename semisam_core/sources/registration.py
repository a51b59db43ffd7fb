"""Registered labels as a source: the site's own labels carried to another scan by an affine registration.

Mattes mutual information (Mattes et al., IEEE TMI 2003) over a multi-resolution pyramid, by SimpleITK. Bounded in time
by the number of iterations and of sampled voxels; the same scans give the same transform.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from torch import Tensor

from semisam_core.files import write_json
from semisam_core.pseudo_labels.memory import REGISTERED
from semisam_core.scratch import Scratch
from semisam_core.sources.base import Evidence, SourceName, SourceScan, nothing

logger = logging.getLogger(__name__)

NUMBERS = 12  # of an affine transform
BINS = 32
SAMPLING_SEED = 1  # of where samples lie within their voxels; by default, ITK takes the clock
SMALL = 64  # voxels along the shortest side; a smaller scan has too few voxels left after shrinking by 4
MINIMUM_OVERLAP = 0.5  # of the scans' fields of view after registration; below, they show different parts of the body


@dataclass(frozen=True, eq=False)
class Atlas:
    """One labeled scan of this site.

    Attributes:
        key: identity of the scan.
        image: (C, H, W, D); the first channel is registered.
        label: (H, W, D) class indices.
        spacing_mm: voxel size.
        scratch: where image and label are, if not in memory.
    """

    key: str
    image: Tensor
    label: Tensor
    spacing_mm: tuple[float, float, float]
    scratch: Scratch = field(default_factory=Scratch)


class TransformStore:
    """Transforms on the site's disk by the keys of two scans, so that each pair is registered only once.

    Args:
        folder: created on the first write.
        iterations: of the optimizer; other numbers give other transforms.
    """

    def __init__(self, folder: Path, iterations: int) -> None:
        self._folder, self._iterations = folder, iterations

    def __call__(self, atlas: str, scan: str, make: Callable[[], list[float]]) -> list[float]:
        """Return the twelve numbers of a pair of scans, made on first use or if the file cannot be read.

        Raises:
            OSError: the disk is full.
            RuntimeError: `make` raised it.
        """
        path = self._folder / f"{atlas}-{scan}-{self._iterations}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if len(kept) == NUMBERS and all(isinstance(each, float) and math.isfinite(each) for each in kept):
                return list(kept)
        except (OSError, ValueError, TypeError):
            pass
        made = make()
        write_json(path, made)
        return made


class RegistrationSource:
    """Says where the site's labels lie after registration: the mean over the site's labeled scans.

    Args:
        atlases: the site's labeled scans.
        iterations: of the optimizer at each resolution.
        limit: how many labeled scans are registered at most; the first in order.
        cached: (key of the labeled scan, key of the scan, make) -> twelve numbers; where transforms are kept.
    """

    name = SourceName.REGISTRATION

    def __init__(
        self,
        atlases: Sequence[Atlas],
        iterations: int = 100,
        limit: int = 4,
        cached: Callable[[str, str, Callable[[], list[float]]], list[float]] = lambda _a, _b, make: make(),
    ) -> None:
        self._atlases, self._iterations, self._limit, self._cached = tuple(atlases), iterations, limit, cached

    def look(self, scan: SourceScan) -> Evidence:
        """Return the mean of the labels that were carried over; nothing where no scan could be registered."""
        mean, grid = scan.maps(), _Grid.of(scan.image[0], scan.spacing_mm)
        found = [(atlas, self._transform(atlas, scan, grid)) for atlas in self._atlases[: self._limit]]
        moves = [(atlas, transform) for atlas, transform in found if transform is not None]
        if not moves:
            return nothing(scan)
        for k in range(scan.classes):
            carried = []
            for atlas, transform in moves:
                moved = _moved(atlas.label == 1 + k, atlas.spacing_mm, grid, transform, SimpleITK.sitkLinear)
                atlas.scratch.release()
                carried.append(scan.scratch.zeros(grid.shape))
                for place, row in zip(carried[-1], moved, strict=True):
                    place.copy_(row).clamp_(0, 1)
                del moved
                scan.scratch.release()
            for place, *each in scan.scratch.blocks(mean[k], *carried):
                place.copy_(torch.stack(each).mean(0))
        return Evidence.of(mean, scan.scratch)

    def without(self, key: str) -> RegistrationSource | None:
        """Return this source with the other labeled scans only, or None where there is no other."""
        others = [atlas for atlas in self._atlases if atlas.key != key]
        return RegistrationSource(others, self._iterations, self._limit, self._cached) if others else None

    def _transform(self, atlas: Atlas, scan: SourceScan, grid: _Grid) -> SimpleITK.AffineTransform | None:
        """Return the transform from a scan to a labeled one; None if they cannot be registered."""

        def register() -> list[float]:
            fixed, moving = _image(scan.image[0], scan.spacing_mm), _image(atlas.image[0], atlas.spacing_mm)
            atlas.scratch.release()
            return register_affine(fixed, moving, self._iterations)

        try:
            transform = _affine(self._cached(atlas.key, scan.key, register))
        except RuntimeError as error:  # SimpleITK's word for samples that all map outside the other scan
            logger.warning("A labeled scan could not be registered: %s", str(error).strip().splitlines()[-1])
            return None
        everywhere = torch.ones(atlas.label.shape, dtype=torch.bool)
        inside = _moved(everywhere, atlas.spacing_mm, grid, transform, SimpleITK.sitkNearestNeighbor)
        return transform if int(inside.count_nonzero()) >= MINIMUM_OVERLAP * inside.numel() else None


def register_affine(fixed: SimpleITK.Image, moving: SimpleITK.Image, iterations: int) -> list[float]:
    """Return the twelve numbers of the affine transform from `fixed` to `moving` in millimetres: matrix, then offset.

    Raises:
        RuntimeError: the scans do not overlap enough to be compared.
    """
    start = SimpleITK.CenteredTransformInitializer(
        fixed, moving, SimpleITK.AffineTransform(3), SimpleITK.CenteredTransformInitializerFilter.GEOMETRY
    )
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    levels, share = ((2, 1), 0.5) if min(fixed.GetSize()) < SMALL else ((4, 2), 0.2)
    method.SetMetricSamplingPercentage(share, SAMPLING_SEED)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-3, numberOfIterations=iterations, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(levels)
    method.SetSmoothingSigmasPerLevel([float(level) for level in levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(start, inPlace=False)
    with _one_thread():
        executed = method.Execute(fixed, moving)
    found = SimpleITK.AffineTransform(SimpleITK.CompositeTransform(executed).GetNthTransform(0))
    matrix = np.asarray(found.GetMatrix()).reshape(3, 3)
    centre, shift = np.asarray(found.GetCenter()), np.asarray(found.GetTranslation())
    offset = shift + centre - matrix @ centre
    return [float(value) for value in (*matrix.ravel(), *offset)]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let ITK use one thread: sums in another order give another transform.

    The method's own number of threads does not reach its metric, so the process's default must be changed.
    """
    before = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def _affine(numbers: Sequence[float]) -> SimpleITK.AffineTransform:
    transform = SimpleITK.AffineTransform(3)
    transform.SetMatrix([float(value) for value in numbers[:9]])
    transform.SetTranslation([float(value) for value in numbers[9:]])
    return transform


@dataclass(frozen=True)
class _Grid:
    """Where an image of axes H, W, D lies that is centred on the origin, whatever part of its voxels it has."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of(cls, volume: Tensor, spacing_mm: tuple[float, float, float]) -> _Grid:
        height, width, depth = (int(side) for side in volume.shape)
        return cls((height, width, depth), spacing_mm)

    @property
    def origin(self) -> list[float]:
        return [-0.5 * side * (length - 1) for side, length in zip(self.spacing_mm, self.shape, strict=True)]


def _image(volume: Tensor, spacing_mm: tuple[float, float, float]) -> SimpleITK.Image:
    """Return a volume (H, W, D) as an ITK image whose axes are H, W, D, centred on the origin; thinned if large."""
    origin, step = _Grid.of(volume, spacing_mm).origin, math.ceil((volume.numel() / REGISTERED) ** (1 / 3))
    thinned = volume.detach()[::step, ::step, ::step].cpu().float().permute(2, 1, 0).contiguous()
    return _placed(thinned, tuple(step * side for side in spacing_mm), origin)


def _placed(volume: Tensor, spacing_mm: Sequence[float], origin: Sequence[float]) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(volume.numpy())
    image.SetSpacing([float(side) for side in spacing_mm])
    image.SetOrigin(origin)
    return image


def _moved(
    mask: Tensor,
    spacing_mm: tuple[float, float, float],
    grid: _Grid,
    transform: SimpleITK.Transform,
    interpolator: int,
) -> Tensor:
    """Return a mask (H, W, D) after a transform, on another grid: float32 for linear interpolation, else uint8."""
    origin = _Grid.of(mask, spacing_mm).origin
    image = _placed(mask.to(torch.uint8).permute(2, 1, 0).contiguous(), spacing_mm, origin)
    linear = interpolator == SimpleITK.sitkLinear
    moved = SimpleITK.Resample(
        image,
        grid.shape,
        transform,
        interpolator,
        grid.origin,
        [float(side) for side in grid.spacing_mm],
        [float(number) for number in np.eye(3).ravel()],
        0.0,
        SimpleITK.sitkFloat32 if linear else SimpleITK.sitkUInt8,
    )
    return torch.from_numpy(SimpleITK.GetArrayFromImage(moved).transpose(2, 1, 0))
