"""Whole-scan prediction and segmentation with the specialist alone: no generalist, no server."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from semisam_core.components import largest_component
from semisam_core.contract import initial_head, travelling
from semisam_core.data.resampling import Block, GridChange
from semisam_core.data.scans import Scan
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback
from semisam_core.scratch import Scratch
from semisam_core.sliding_window import BATCH, SIGMA_SCALE, SlidingProbabilities
from semisam_core.specialists import build_specialist


def initial_weights(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors with which a study begins, as sent to sites: the specialist's and the feature head's."""
    return travelling(plan, new_specialist(plan)) | initial_head(plan)


def new_specialist(plan: Plan) -> nn.Module:
    """Build the plan's specialist with initial weights that depend on the plan alone."""
    return build_specialist(
        plan.specialist.name,
        plan.specialist.arguments,
        len(plan.task.channels),
        len(plan.task.classes),
        plan.seed,
    )


def predict(
    network: nn.Module,
    image: Tensor,
    plan: Plan,
    device: torch.device,
    overlap: float | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return class probabilities of a whole scan by a sliding window.

    With scratch they are the same bit by bit with one CPU thread (see `semisam_core/sliding_window.py`).

    Args:
        network: the specialist or its teacher; runs in evaluation mode and gets its own mode back.
        image: (C, H, W, D) on the plan's grid.
        plan: patch size.
        device: where to compute.
        overlap: share of a window that its neighbour covers, below 1; None for the plan's `evaluation.overlap`.
        scratch: where to make them, with the rows of a few windows in memory at a time; None for memory.

    Returns:
        (1 + K, H, W, D) float32 on the CPU, contiguous; sums to one over the first axis.
    """
    was_training = network.training
    network.eval()
    try:
        share = plan.evaluation.overlap if overlap is None else overlap
        with torch.inference_mode():
            if scratch is not None:
                classes = 1 + len(plan.task.classes)
                rows = SlidingProbabilities(network, image, classes, plan.data.patch, share, device, scratch)
                rows.advance(image.shape[1])
                return rows.volume if rows.volume.is_contiguous() else _cut_out(rows.volume, scratch)
            logits = sliding_window_inference(
                image[None].to(device),
                plan.data.patch,
                sw_batch_size=BATCH,
                predictor=network,
                overlap=share,
                mode="gaussian",
                sigma_scale=SIGMA_SCALE,
            )
            return torch.as_tensor(logits)[0].float().softmax(0).cpu()
    finally:
        network.train(was_training)


def _cut_out(padded: Tensor, scratch: Scratch) -> Tensor:
    """Return a copy of a scan's maps without the padding of a scan smaller than a window; others need none."""
    found = scratch.zeros(padded.shape)
    for place, each in zip(found, padded, strict=True):
        place.copy_(each)
        scratch.release()
    return found


def segment_original(
    network: nn.Module,
    scan: Scan,
    plan: Plan,
    device: torch.device,
    overlap: float | None = None,
    progress: ProgressCallback | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return the segmentation of a scan on the grid of its own file, in bounded memory.

    It is `segmentation(to_original(predict(...), scan), plan)`, voxel by voxel, without ever holding the probabilities
    of the whole scan: of the prediction, the rows that one window is long and those that a block of planes of the
    result needs; of the probabilities on the scan's own grid, one block. (20 channels of 512 x 512 x 600 voxels would
    take 12.6 GB.)

    Args:
        network: the specialist or its teacher; runs in evaluation mode and gets its own mode back.
        scan: the scan on the plan's grid.
        plan: patch size, and which classes are connected.
        device: where to compute. Sums of windows and the result are on the CPU.
        overlap: as in `predict`.
        progress: called with (planes done, planes of the result) after each block.
        scratch: where to keep the prediction's rows, which grow with the number of classes; None for memory.

    Returns:
        (X, Y, Z) uint8 of class indices on `scan.original`: 0 background, k the plan's k-th class.
    """
    classes = 1 + len(plan.task.classes)
    change = GridChange(scan.grid, scan.original)
    axis = change.axis_of_rows
    found = torch.zeros(scan.original.shape, dtype=torch.uint8)
    blocks = sorted((change.source_rows(block), block.start, block) for block in change.blocks(axis, 4 * classes))
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            share = plan.evaluation.overlap if overlap is None else overlap
            rolling = SlidingProbabilities(network, scan.image, classes, plan.data.patch, share, device, scratch)
            for number, ((_, rows), _, block) in enumerate(blocks):
                rolling.advance(rows)
                block.of(found).copy_(_most_probable(rolling.volume, change, block))
                if scratch is not None:
                    scratch.release()
                rolling.release(min((first for (first, _), _, _ in blocks[number + 1 :]), default=0))
                if progress is not None:
                    progress(sum(each.stop - each.start for _, _, each in blocks[: number + 1]), found.shape[axis])
    finally:
        network.train(was_training)
    return only_connected(found, plan)


def _most_probable(probability: Tensor, change: GridChange, block: Block) -> Tensor:
    """Return the most probable class of each voxel of a block of the target grid."""
    if change.unchanged:
        return block.of(probability).argmax(0)
    return change.sample(probability, block).argmax(0)


def segmentation(probability: Tensor, plan: Plan) -> Tensor:
    """Return the segmentation of a prediction, as it is scored and shown.

    Each voxel gets its most probable class. A class that the plan calls `connected` keeps only its largest connected
    component, by number of voxels; the rest becomes background, even where another class is second. Voxels that share a
    face, an edge or a corner are connected, so that a thin diagonal part is not cut off. Among components of equal
    size, the first in array order stays.

    Args:
        probability: (1 + K, H, W, D) on the CPU, on any grid.
        plan: which of its K classes are connected.

    Returns:
        (H, W, D) int64 of class indices: 0 background, k the plan's k-th class.
    """
    return only_connected(probability.argmax(0), plan)


def only_connected(indices: Tensor, plan: Plan) -> Tensor:
    """Set everything but the largest component of each `connected` class to background, in place.

    Args:
        indices: (H, W, D) whole numbers, class indices, on the CPU.
        plan: which classes are connected.
    """
    boxes = ndimage.find_objects(indices.numpy(), max_label=len(plan.task.classes))
    for k, (target, box) in enumerate(zip(plan.task.classes, boxes, strict=True), start=1):
        if target.connected and box is not None:
            inside = indices[box]
            mask = inside == k
            inside[mask & ~torch.from_numpy(largest_component(mask.numpy()))] = 0
    return indices
