"""Segment scans with one trained specialist, or with the mean of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from release.inputs import prepared
from release.model import ModelError, TrainedModel
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import resample
from semisam_core.inference import only_connected, predict, segment_original

SLAB_BYTES = 1 << 29  # of probabilities on the scan's own grid at a time


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What models found in one scan.

    Attributes:
        labels: (X, Y, Z) on the scan's own grid, with the values that the plan gives its classes.
        uncertainty: (X, Y, Z) float32, the entropy of the mean probability over classes, from 0 (certain) to 1 (all
            classes are equally likely); None if it was not asked for.
        volumes_ml: class name -> volume.
    """

    labels: NDArray[np.uint16]
    uncertainty: NDArray[np.float32] | None
    volumes_ml: dict[str, float]


class Predictor:
    """Segments scans.

    Args:
        models: one or several with the same classes and channels; their probabilities are averaged.
        device: where to compute.

    Raises:
        ModelError: the models are for different tasks.
    """

    def __init__(self, models: Sequence[TrainedModel], device: torch.device) -> None:
        self.models, self.device = tuple(models), device
        first = models[0].plan.task
        for model in models[1:]:
            task = model.plan.task
            if (task.classes, task.channels) != (first.classes, first.channels):
                raise ModelError(f"{model.path}: its classes or channels are not those of {models[0].path}.")
        for model in models:
            model.specialist.to(device)
        self.plan = models[0].plan

    def segment(self, stack: NDArray[np.float32], grid: Geometry, name: str, uncertainty: bool = False) -> Segmentation:
        """Segment one scan.

        Args:
            stack: (C, X, Y, Z) channels in the plan's order.
            grid: where its voxels lie.
            name: for messages.
            uncertainty: whether to return a map of it.

        Raises:
            CaseError: the scan has voxels that are not finite.
        """
        classes = self.plan.task.classes
        if len(self.models) == 1 and not uncertainty:
            scan = prepared(stack, grid, name, self.plan)
            indices = segment_original(self.models[0].specialist, scan, self.plan, self.device)
            return self._result(indices, None, grid)
        found = []
        for model in self.models:
            scan = prepared(stack, grid, name, model.plan)
            found.append((predict(model.specialist, scan.image, model.plan, self.device), scan.grid))
        indices = torch.empty(grid.shape, dtype=torch.int64)
        unsure = np.empty(grid.shape, dtype=np.float32) if uncertainty else None
        for part, slab in _slabs(grid, 1 + len(classes)):
            probability = _mean([resample(each, own, slab) for each, own in found])
            indices[:, :, part] = probability.argmax(0)
            if unsure is not None:
                unsure[:, :, part] = _entropy(probability).numpy()
        return self._result(only_connected(indices, self.plan), unsure, grid)

    def _result(self, indices: Tensor, unsure: NDArray[np.float32] | None, grid: Geometry) -> Segmentation:
        classes = self.plan.task.classes
        values = np.array([0, *(each.label_values[0] for each in classes)], dtype=np.uint16)
        voxel_ml = abs(float(np.linalg.det(grid.affine.numpy()[:3, :3]))) / 1000
        counts = torch.bincount(indices.flatten().long(), minlength=1 + len(classes)).tolist()
        volumes = {each.name: round(count * voxel_ml, 4) for each, count in zip(classes, counts[1:], strict=True)}
        return Segmentation(values[indices.numpy()], unsure, volumes)


def _slabs(grid: Geometry, channels: int) -> Iterator[tuple[slice, Geometry]]:
    """Cut a grid along its last axis, so that the probabilities on a slab take a bounded amount of memory."""
    x, y, z = grid.shape
    thick = max(1, SLAB_BYTES // (4 * channels * x * y))
    for start in range(0, z, thick):
        end = min(z, start + thick)
        affine = grid.affine.clone()
        affine[:3, 3] += start * affine[:3, 2]
        yield slice(start, end), Geometry((x, y, end - start), affine)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)


def _entropy(probability: Tensor) -> Tensor:
    p = probability.clamp(1e-7, 1)
    p = p / p.sum(0, keepdim=True)
    return (-(p * p.log()).sum(0) / math.log(len(p))).clamp(0, 1)
