"""A picture of one case: scan, truth, pseudo-label and prediction on three slices."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from semisam_core.files import write_atomically

Planes = Callable[[int], Iterator[Tensor]]
"""Returns what a slice shows of each class, (H, W)."""
COLOURS = ("#ff5a36", "#2f9bff", "#37c871", "#e0b000", "#b06cff", "#00b5ad")


@dataclass(frozen=True)
class Panel:
    """The contents of the picture.

    Attributes:
        site: the title.
        image: (H, W, D).
        truth: (H, W, D) class indices, or None without a label.
        pseudo_label: its target (K, H, W, D), or None where none can be made.
        prediction: the specialist's segmentation, (H, W, D) class indices.
        classes: K.
        spacing_mm: voxel size along H, W, D.
    """

    site: str
    image: Tensor
    truth: Tensor | None
    pseudo_label: Tensor | None
    prediction: Tensor
    classes: int
    spacing_mm: Sequence[float]


def draw_overview(panel: Panel, path: Path) -> None:
    """Write the picture as a PNG, atomically.

    Raises:
        OSError: the disk is full.
    """
    truth, pseudo_label, classes = panel.truth, panel.pseudo_label, panel.classes
    columns: tuple[tuple[str, Planes | None, str | None], ...] = (
        ("scan", None, None),
        ("truth", None if truth is None else partial(_of_label, truth, classes), "no label here"),
        ("pseudo-label", None if pseudo_label is None else partial(_of_masks, pseudo_label), "none at this site"),
        ("prediction", partial(_of_label, panel.prediction, classes), None),
    )
    slices = _interesting_slices(panel.prediction if truth is None else truth)
    figure = Figure(figsize=(3 * len(columns), 3 * len(slices) + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(slices), len(columns), squeeze=False)
    low, high = np.percentile(panel.image.numpy(), [1, 99])
    for row, index in enumerate(slices):
        for column, (title, planes, absent) in enumerate(columns):
            ax = axes[row][column]
            ax.imshow(
                panel.image[:, :, index].T.numpy(),
                cmap="gray",
                vmin=low,
                vmax=high,
                origin="lower",
                aspect=panel.spacing_mm[1] / panel.spacing_mm[0],
            )
            ax.set_title(f"{title}, slice {index}" if column == 0 else title, fontsize=10)
            ax.set_axis_off()
            _outline(ax, None if planes is None else planes(index), absent)
    figure.suptitle(f"Site {panel.site}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    write_atomically(path, buffer.getvalue())


def _of_label(label: Tensor, classes: int, index: int) -> Iterator[Tensor]:
    return ((label[:, :, index] == k).float() for k in range(1, classes + 1))


def _of_masks(masks: Tensor, index: int) -> Iterator[Tensor]:
    return (mask[:, :, index] for mask in masks)


def _outline(ax: Axes, planes: Iterator[Tensor] | None, absent: str | None) -> None:
    if planes is None:
        if absent is not None:
            ax.text(0.5, 0.5, absent, transform=ax.transAxes, ha="center", color="white")
        return
    for k, mask in enumerate(planes):
        plane = mask.T.numpy()
        colour = COLOURS[k % len(COLOURS)]
        if plane.max() > 0.5 > plane.min():
            ax.contour(plane, levels=[0.5], colors=[colour], linewidths=1.5)


def _interesting_slices(label: Tensor) -> list[int]:
    """Return three slices spread over the foreground, or over the scan if there is none."""
    depth = label.shape[-1]
    present = torch.nonzero((label > 0).flatten(0, 1).any(0)).flatten()
    low, high = (int(present[0]), int(present[-1])) if len(present) else (0, depth - 1)
    return [round(low + share * (high - low)) for share in (0.25, 0.5, 0.75)]
