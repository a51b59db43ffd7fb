"""From prompts on a scan to queries for SAM's decoder, slice by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from semisam_core.generalists.base import Point, Prompts, SliceBox, VolumeGrid
from semisam_core.generalists.slices import Framing

_LEAST = 1e-3  # probabilities are clamped this far from 0 and 1, so that their logits stay within -6.9 to 6.9
_OUTSIDE = -10.0  # logit of the padding around a mask prompt: more certainly background than any voxel


@dataclass(frozen=True, eq=False)
class Query:
    """One query to the decoder, which gives one answer.

    Attributes:
        index: slice number.
        box: edges (x_min, y_min, x_max, y_max) in frame pixels, or None.
        points: (x, y) in frame pixels.
        labels: 1 for each positive point, 0 for each negative one.
        mask: logits (1, S, S) on the low-resolution frame, or None.
    """

    index: int
    box: tuple[float, float, float, float] | None
    points: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    mask: Tensor | None

    @property
    def structure(self) -> tuple[bool, int, bool]:
        """Has a box, number of points, has a mask: only queries of equal structure can share a batch."""
        return self.box is not None, len(self.points), self.mask is not None

    @property
    def ambiguous(self) -> bool:
        """Whether the query is a single point, which may mean a part, the whole or something larger."""
        return self.structure == (False, 1, False)


def answered_slices(prompts: Prompts, grid: VolumeGrid, framing: Framing) -> tuple[int, ...]:
    """Return the slices that have a box, a positive point or mask foreground, in ascending order.

    Raises:
        ValueError: a prompt is outside the scan, empty, not finite or not on a slice, or the mask is not a probability
            of the scan's shape.
    """
    _check_mask(prompts.mask, grid)
    for box in prompts.boxes:
        framing.box(box, grid.shape)
    for point in prompts.points:
        framing.point(point, grid.shape)
    return replace(prompts, points=tuple(point for point in prompts.points if point.positive)).slices()


def make_queries(prompts: Prompts, grid: VolumeGrid, framing: Framing, mask_side: int) -> list[Query]:
    """Turn prompts into queries, in an order that does not depend on the order of the prompts.

    All prompts on a slice form one query, unless the slice has several boxes. Then each box is a query of its own, with
    the mask inside it, all negative points, and the positive points inside it; a positive point outside all boxes
    belongs to the nearest. A slice that has only negative points gets no query.

    Args:
        prompts: boxes, points and mask in voxels of the scan.
        grid: the scan's voxels.
        framing: how slices map to the encoder's input.
        mask_side: pixels along each side of the frame of mask prompts.

    Raises:
        ValueError: as `answered_slices`.
    """
    answered = answered_slices(prompts, grid, framing)
    boxes = sorted(prompts.boxes, key=lambda box: box.bounds)
    points = sorted(prompts.points, key=lambda point: (point.position, point.positive))
    queries: list[Query] = []
    for index in answered:
        here = [point for point in points if point.position[2] == index]
        probability = None if prompts.mask is None else prompts.mask[:, :, index].float().cpu()
        for box, shared, cut in _parts([box for box in boxes if box.index == index], here, probability):
            queries.append(
                Query(
                    index=index,
                    box=None if box is None else framing.box(box, grid.shape),
                    points=tuple(framing.point(point, grid.shape) for point in shared),
                    labels=tuple(int(point.positive) for point in shared),
                    mask=None if cut is None else framing.mask(_logits(cut)[None], mask_side, _OUTSIDE)[0],
                )
            )
    return queries


_Part = tuple[SliceBox | None, Sequence[Point], Tensor | None]


def _parts(boxes: Sequence[SliceBox], points: Sequence[Point], probability: Tensor | None) -> list[_Part]:
    """Distribute the points and the mask (H, W) of one slice among its boxes."""
    if len(boxes) < 2:
        return [(boxes[0] if boxes else None, points, probability)]
    return [
        (
            box,
            [point for point in points if not point.positive or _belongs_to(point, box, boxes)],
            None if probability is None else _inside(probability, box),
        )
        for box in boxes
    ]


def _belongs_to(point: Point, box: SliceBox, boxes: Sequence[SliceBox]) -> bool:
    """Return whether no other box is nearer to the point."""
    return _distance(point, box) == min(_distance(point, each) for each in boxes)


def _distance(point: Point, box: SliceBox) -> float:
    """Return the in-plane distance from a point to a box in voxels; 0 inside. A box ends at its voxels' edges."""
    row, column, _ = point.position
    row_min, column_min, row_max, column_max = box.bounds
    beyond_rows = max(row_min - 0.5 - row, row - row_max - 0.5, 0.0)
    beyond_columns = max(column_min - 0.5 - column, column - column_max - 0.5, 0.0)
    return math.hypot(beyond_rows, beyond_columns)


def _inside(probability: Tensor, box: SliceBox) -> Tensor:
    """Return the probability (H, W), 0 at voxels whose centres are outside the box."""
    row_min, column_min, row_max, column_max = box.bounds
    rows, columns = (torch.arange(side) for side in probability.shape)
    rows_inside = (rows >= row_min - 0.5) & (rows <= row_max + 0.5)
    columns_inside = (columns >= column_min - 0.5) & (columns <= column_max + 0.5)
    return probability * (rows_inside[:, None] & columns_inside)


def _logits(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(_LEAST, 1 - _LEAST))


def _check_mask(mask: Tensor | None, grid: VolumeGrid) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != grid.shape:
        raise ValueError(f"a mask prompt must have the scan's shape {grid.shape}, not {tuple(mask.shape)}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("a mask prompt must be a probability, between 0 and 1 everywhere")
