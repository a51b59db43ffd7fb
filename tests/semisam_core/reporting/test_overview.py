"""The picture of a site's case is a readable PNG, even without truth or pseudo-label."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from semisam_core.reporting import overview
from semisam_core.reporting.overview import COLOURS, Panel, draw_overview
from tests.conftest import blob

COLUMN_WIDTH, ROW_HEIGHT = 270, 270  # pixels, without margins


def _panel(**changes: Any) -> Panel:
    image, label = blob()
    mask = torch.from_numpy(label).float()[None]
    truth = torch.from_numpy(label)
    panel = Panel("alpha", torch.from_numpy(image), truth, mask, (truth == 1).byte(), 1, (2.0, 2.0, 2.0))
    return dataclasses.replace(panel, **changes)


def _drawn(panel: Panel, folder: Path) -> NDArray[Any]:
    """Draw; return the picture, (H, W, 3) in 0..255."""
    draw_overview(panel, folder / "overview.png")
    with Image.open(folder / "overview.png") as picture:
        picture.verify()
    with Image.open(folder / "overview.png") as picture:
        assert picture.format == "PNG"
        pixels: NDArray[Any] = np.asarray(picture.convert("RGB")).astype(int)
    return pixels


def _columns_with(pixels: NDArray[Any], colour: str) -> list[int]:
    """Return which of the four columns have a line of this colour."""
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    near = (np.abs(pixels - wanted) < 40).all(-1)
    return [k for k, part in enumerate(np.array_split(near, 4, axis=1)) if part.sum() > 20]


def test_the_picture_is_a_png_of_three_rows_and_four_columns(tmp_path: Path) -> None:
    pixels = _drawn(_panel(), tmp_path)
    assert pixels.shape[0] == pytest.approx(3 * ROW_HEIGHT, rel=0.1)
    assert pixels.shape[1] == pytest.approx(4 * COLUMN_WIDTH, rel=0.1)
    assert 10_000 < (tmp_path / "overview.png").stat().st_size < 2_000_000


def test_the_scan_is_bare_and_truth_pseudo_label_and_prediction_are_outlined(tmp_path: Path) -> None:
    assert _columns_with(_drawn(_panel(), tmp_path), COLOURS[0]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("absent", "outlined"),
    [
        ({"truth": None}, [2, 3]),
        ({"pseudo_label": None}, [1, 3]),
        ({"truth": None, "pseudo_label": None}, [3]),
    ],
)
def test_missing_masks_are_left_out(tmp_path: Path, absent: dict[str, Any], outlined: list[int]) -> None:
    assert _columns_with(_drawn(_panel(**absent), tmp_path), COLOURS[0]) == outlined


def test_each_class_has_its_own_colour(tmp_path: Path) -> None:
    truth = torch.zeros(24, 24, 16, dtype=torch.uint8)
    truth[2:8, 2:8, 2:14], truth[14:20, 14:20, 2:14], truth[2:8, 14:20, 2:14] = 1, 2, 3
    masks = torch.stack([(truth == k).float() for k in (1, 2, 3)])
    pixels = _drawn(_panel(truth=truth, pseudo_label=masks, prediction=truth, classes=3), tmp_path)
    for colour in COLOURS[:3]:
        assert _columns_with(pixels, colour) == [1, 2, 3]


def test_more_classes_than_colours_can_be_drawn(tmp_path: Path) -> None:
    masks = torch.rand((len(COLOURS) + 2, 12, 12, 6), generator=torch.Generator().manual_seed(0))
    found = masks.argmax(0).byte()
    _drawn(_panel(image=masks[0], truth=None, pseudo_label=masks, prediction=found, classes=len(masks)), tmp_path)


@pytest.mark.parametrize("fill", [0, 1])
def test_an_empty_or_full_prediction_has_no_outline(tmp_path: Path, fill: int) -> None:
    found = torch.full((24, 24, 16), fill, dtype=torch.uint8)
    assert _columns_with(_drawn(_panel(prediction=found), tmp_path), COLOURS[0]) == [1, 2]
    _drawn(_panel(truth=None, pseudo_label=None, prediction=found), tmp_path)


def test_the_slices_are_those_with_the_target(tmp_path: Path) -> None:
    """Targets on different slices of one scan give different pictures."""
    image = torch.arange(16.0).expand(24, 24, 16)

    def bare_scan(first: int) -> NDArray[Any]:
        truth = torch.zeros(24, 24, 16, dtype=torch.uint8)
        truth[8:16, 8:16, first : first + 3] = 1
        pixels = _drawn(_panel(image=image, truth=truth, pseudo_label=None, prediction=truth), tmp_path)
        return pixels[:, : pixels.shape[1] // 4]

    low, high = bare_scan(1), bare_scan(12)
    assert float(np.median(low[200:250, 100:150])) < float(np.median(high[200:250, 100:150]))


@pytest.mark.parametrize("shape", [(40, 20, 4), (8, 30, 1)])
@pytest.mark.parametrize("spacing_mm", [(0.5, 0.5, 6.0), (1.0, 3.0, 1.0)])
def test_scans_of_any_shape_and_spacing_are_drawn(
    tmp_path: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _drawn(Panel("alpha", image, None, None, (image > 0).byte(), 1, spacing_mm), tmp_path)


def test_a_constant_scan_is_drawn(tmp_path: Path) -> None:
    _drawn(_panel(image=torch.zeros(24, 24, 16)), tmp_path)


def test_the_same_panel_gives_the_same_picture(tmp_path: Path) -> None:
    assert np.array_equal(_drawn(_panel(), tmp_path), _drawn(_panel(), tmp_path))


def test_no_figure_is_left_open(tmp_path: Path) -> None:
    before = pyplot.get_fignums()
    _drawn(_panel(), tmp_path)
    assert pyplot.get_fignums() == before


def test_a_full_disk_leaves_the_previous_picture_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = _drawn(_panel(), tmp_path)

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(overview, "write_atomically", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        draw_overview(_panel(truth=None), tmp_path / "overview.png")
    with Image.open(tmp_path / "overview.png") as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")).astype(int), earlier)


def test_pictures_have_the_patients_proportions(tmp_path: Path) -> None:
    """A ball in millimetres is round in the picture even if its voxels are not cubes."""
    spacing = (1.0, 3.0, 2.0)
    grid = torch.stack(torch.meshgrid(*(torch.arange(side) for side in (60, 20, 9)), indexing="ij"), -1)
    distance = ((grid - torch.tensor([29.5, 9.5, 4.0])) * torch.tensor(spacing)).norm(dim=-1)
    ball: Tensor = (distance < 20).byte()
    pixels = _drawn(Panel("alpha", ball.float(), None, None, ball, 1, spacing), tmp_path)
    right = pixels[:, 3 * pixels.shape[1] // 4 :]
    wanted = [int(COLOURS[0][k : k + 2], 16) for k in (1, 3, 5)]
    where = np.argwhere((np.abs(right - wanted) < 40).all(-1))
    middle = where[(where[:, 0] > pixels.shape[0] / 3) & (where[:, 0] < 2 * pixels.shape[0] / 3)]
    height, width = middle.max(0) - middle.min(0)
    assert height == pytest.approx(width, rel=0.15)
