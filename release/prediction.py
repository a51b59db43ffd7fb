"""Segment scans with one trained specialist, or with the mean of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from release.inputs import maps_of, prepared
from release.memory import check_memory
from release.model import ModelError, TrainedModel
from semisam_core.data.geometry import Geometry
from semisam_core.data.nifti import check_sizes
from semisam_core.data.resampling import Block, GridChange
from semisam_core.data.scans import Scan
from semisam_core.inference import only_connected, segment_original
from semisam_core.sliding_window import SlidingProbabilities


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What models found in one scan.

    Attributes:
        labels: (X, Y, Z) on the scan's own grid, with the values that the plan gives its classes: of a class that is
            the union of several, the first.
        maps: name -> (X, Y, Z) float32 from 0 to 1, if they were asked for. `uncertainty` is the entropy over classes
            of the mean probability, from 0 (certain) to 1 (all classes are equally likely). `disagreement`, of several
            models only, is the part of it that each model by itself does not have: the entropy of the mean less the
            mean of the entropies (the mutual information between model and class, Gal et al., ICML 2017), from 0 (all
            give the same probabilities) to 1 (each is certain, and they are as divided as they can be).
        volumes_ml: class name -> volume.
    """

    labels: NDArray[np.uint8]
    maps: dict[str, NDArray[np.float32]]
    volumes_ml: dict[str, float]


class Predictor:
    """Segments scans.

    Args:
        models: one or several with the same classes and channels; their probabilities are averaged. Each may have a
            grid of its own: they are averaged on the scan's.
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
            model.specialist.to(device).eval()
        self.plan = models[0].plan

    def segment(
        self,
        stack: NDArray[np.float32],
        grid: Geometry,
        name: str,
        uncertainty: bool = False,
        memory_gb: float | None = None,
    ) -> Segmentation:
        """Segment one scan: with one model, voxel by voxel what a site's evaluation scores.

        Args:
            stack: (C, X, Y, Z) channels in the plan's order; NaN in it may be set to 0.
            grid: where its voxels lie.
            name: for messages.
            uncertainty: whether to return maps of it.
            memory_gb: memory that this may take, judged by the sizes of the grids; None for no limit.

        Raises:
            CaseError: the scan has voxels that are not finite or a size that no patient has, or would take too much
                memory.
        """
        check_sizes(grid, name, "image")
        if memory_gb is not None:
            check_memory(grid, [each.plan for each in self.models], uncertainty, name, memory_gb)
        scans = self._prepare(stack, grid, name)
        if len(scans) == 1 and not uncertainty:
            model, maps = self.models[0], dict[str, Tensor]()
            indices = segment_original(model.specialist, scans[0], model.plan, self.device)
        else:
            indices, maps = self._mean_of_all(scans, uncertainty)
        classes = self.plan.task.classes
        values = np.array([0, *(each.label_values[0] for each in classes)], dtype=np.uint8)
        voxel_ml = abs(float(np.linalg.det(grid.affine.numpy()[:3, :3]))) / 1000
        counts = [int((indices == k).sum()) for k in range(1, 1 + len(classes))]
        volumes = {each.name: round(count * voxel_ml, 4) for each, count in zip(classes, counts, strict=True)}
        return Segmentation(values[indices.numpy()], {name: each.numpy() for name, each in maps.items()}, volumes)

    def _prepare(self, stack: NDArray[np.float32], grid: Geometry, name: str) -> list[Scan]:
        """Return the scan as each model sees it; models of equal settings share one."""
        by_settings: dict[str, Scan] = {}
        keys = [each.plan.data.model_dump_json(include={"spacing_mm", "intensity", "nan"}) for each in self.models]
        for key, model in zip(keys, self.models, strict=True):
            if key not in by_settings:
                own = stack if len(set(keys)) == 1 else stack.copy()  # preparing may set NaN to zero
                by_settings[key] = prepared(own, grid, name, model.plan)
        return [by_settings[key] for key in keys]

    @torch.inference_mode()
    def _mean_of_all(self, scans: Sequence[Scan], uncertainty: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return class indices by the mean probability, and maps, block by block of the scan's own grid."""
        shape, channels = scans[0].original.shape, 1 + len(self.plan.task.classes)
        found = torch.zeros(shape, dtype=torch.uint8)
        maps = {name: torch.zeros(shape) for name in maps_of(len(scans))} if uncertainty else {}
        for block, probability, single in self._blocks(scans, channels, "disagreement" in maps):
            block.of(found).copy_(probability.argmax(0))
            if maps:
                entropy = _entropy(probability)
                block.of(maps["uncertainty"]).copy_((entropy / math.log(channels)).clamp(max=1))
                if single is not None:
                    most = math.log(min(channels, len(scans)))
                    block.of(maps["disagreement"]).copy_(((entropy - single) / most).clamp(0, 1))
        return only_connected(found, self.plan), maps

    def _blocks(
        self, scans: Sequence[Scan], channels: int, entropies: bool
    ) -> Iterator[tuple[Block, Tensor, Tensor | None]]:
        """Yield the blocks of the scan's own grid, each with the mean probability there: (channels, x, y, z).

        With `entropies` also the mean over models of the entropy of each by itself, in nats: (x, y, z).
        """
        changes = [GridChange(each.grid, each.original) for each in scans]
        rolling = [
            SlidingProbabilities(
                model.specialist,
                scan.image,
                channels,
                model.plan.data.patch,
                model.plan.evaluation.overlap,
                self.device,
            )
            for model, scan in zip(self.models, scans, strict=True)
        ]
        axis, bytes_per_voxel = changes[0].axis_of_rows, 4 * channels * (1 + len(scans))
        blocks = sorted(changes[0].blocks(axis, bytes_per_voxel), key=lambda each: changes[0].source_rows(each))
        for number, block in enumerate(blocks):
            mean: Tensor | None = None
            single: Tensor | None = None
            for change, volume in zip(changes, rolling, strict=True):
                volume.advance(change.source_rows(block)[1])
                there = block.of(volume.volume) if change.unchanged else change.sample(volume.volume, block)
                mean = there if mean is None else mean + there
                if entropies:
                    single = _entropy(there) if single is None else single + _entropy(there)
                volume.release(min((change.source_rows(each)[0] for each in blocks[number + 1 :]), default=0))
            if mean is not None:
                mean = mean / len(scans) if len(scans) > 1 else mean
                yield block, mean, None if single is None else single / len(scans)


def _entropy(probability: Tensor) -> Tensor:
    """Return the entropy over classes, in nats."""
    p = probability.clamp(1e-7, 1)
    p = p / p.sum(0, keepdim=True)
    return -(p * p.log()).sum(0).clamp(max=0)
