"""A picture of one case: scan, truth, pseudo-label and prediction on three slices."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from semisam_core.files import write_atomically

COLOURS = ("#ff5a36", "#2f9bff", "#37c871", "#e0b000", "#b06cff", "#00b5ad")


@dataclass(frozen=True)
class Panel:
    """The contents of the picture.

    Attributes:
        site: the title.
        image: (H, W, D).
        truth: (H, W, D) class indices, or None without a label.
        pseudo_label: its target (K, H, W, D), or None where none can be made.
        prediction: the specialist's segmentation, a mask of 0 and 1 per class (K, H, W, D).
        spacing_mm: voxel size along H, W, D.
    """

    site: str
    image: Tensor
    truth: Tensor | None
    pseudo_label: Tensor | None
    prediction: Tensor
    spacing_mm: Sequence[float]


def draw_overview(panel: Panel, path: Path) -> None:
    """Write the picture as a PNG, atomically.

    Raises:
        OSError: the disk is full.
    """
    classes = panel.prediction.shape[0]
    truth = None
    if panel.truth is not None:
        truth = torch.stack([(panel.truth == k).float() for k in range(1, classes + 1)])
    columns = (
        ("scan", None, None),
        ("truth", truth, "no label here"),
        ("pseudo-label", panel.pseudo_label, "none at this site"),
        ("prediction", panel.prediction, None),
    )
    slices = _interesting_slices(truth if truth is not None else panel.prediction)
    figure = Figure(figsize=(3 * len(columns), 3 * len(slices) + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(slices), len(columns), squeeze=False)
    low, high = np.percentile(panel.image.numpy(), [1, 99])
    for row, index in enumerate(slices):
        for column, (title, masks, absent) in enumerate(columns):
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
            _outline(ax, masks, index, absent)
    figure.suptitle(f"Site {panel.site}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    write_atomically(path, buffer.getvalue())


def _outline(ax: Axes, masks: Tensor | None, index: int, absent: str | None) -> None:
    if masks is None:
        if absent is not None:
            ax.text(0.5, 0.5, absent, transform=ax.transAxes, ha="center", color="white")
        return
    for k, mask in enumerate(masks):
        plane = mask[:, :, index].T.numpy()
        colour = COLOURS[k % len(COLOURS)]
        if plane.max() > 0.5 > plane.min():
            ax.contour(plane, levels=[0.5], colors=[colour], linewidths=1.5)


def _interesting_slices(masks: Tensor) -> list[int]:
    """Return three slices spread over the foreground, or over the scan if there is none."""
    depth = masks.shape[-1]
    present = torch.nonzero((masks > 0.5).any(0).flatten(0, 1).any(0)).flatten()
    low, high = (int(present[0]), int(present[-1])) if len(present) else (0, depth - 1)
    return [round(low + share * (high - low)) for share in (0.25, 0.5, 0.75)]
