"""What the page shows lies where it lies in the patient: right on the left, front and head on top."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

import review
from review.codec import encode
from review.view import STEPS, View
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_original_label
from semisam_core.plan_sections.task import Intensity
from tests.conftest import tiny_plan, write_nifti

PAGE = Path(review.__file__).parent / "page"
MR = Intensity(kind="percentiles", lower=0.5, upper=99.5)
SHAPE = (6, 7, 5)  # right to left, back to front, foot to head
CODES = ["".join(each) for order in permutations(("RL", "AP", "SI")) for each in product(*order)]


def _turned(volume: NDArray[np.float32], codes: str) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return a volume (right, front, head) stored along other axes, and its affine."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return nib.orientations.apply_orientation(volume, turn), affine @ inv_ornt_aff(turn, volume.shape)


@pytest.mark.parametrize("codes", CODES)
def test_slices_are_turned_as_radiologists_see_them_and_masks_come_back(tmp_path: Path, codes: str) -> None:
    volume = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)  # (right, front, head)
    stored, affine = _turned(volume, codes)
    image = write_nifti(tmp_path / "a.nii.gz", stored, affine)
    mask = (np.random.default_rng(0).random(stored.shape) > 0.5).astype(np.uint8)
    view = View(Case("a", (image,), None, Role.UNLABELED), 0, MR, mask)
    assert view.shape == SHAPE
    assert view.spacing_mm == pytest.approx((1.0, 2.0, 3.0))
    left, back, head = 2, 3, 1  # of the page's axes
    expected = {
        2: volume[::-1, ::-1, head].T,  # rows to the back, columns to the patient's left
        1: volume[::-1, SHAPE[1] - 1 - back, ::-1].T,  # rows to the feet, columns to the patient's left
        0: volume[SHAPE[0] - 1 - left, ::-1, ::-1].T,  # rows to the feet, columns to the back
    }
    for axis, number in ((2, head), (1, back), (0, left)):
        shown = np.frombuffer(view.image_slice(axis, number), "<u2") / STEPS * (volume.size - 1)
        assert np.allclose(shown, expected[axis].reshape(-1), atol=0.01)
    assert np.array_equal(view.from_page(view.to_page(mask)), mask)
    assert view.to_page(mask).shape == view.page_shape == (5, 7, 6)


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's scripts, is not installed")
def test_the_page_lays_the_mask_over_the_image_voxel_by_voxel(tmp_path: Path) -> None:
    """A mask that marks bright voxels must be painted exactly where slices are bright, in every plane."""
    random = np.random.default_rng(1)
    bright = random.random(SHAPE) > 0.6
    stored, affine = _turned(bright.astype(np.float32) * 100, "PSR")
    image = write_nifti(tmp_path / "a.nii.gz", stored, affine)
    mask = (stored > 50).astype(np.uint8)
    view = View(Case("a", (image,), None, Role.UNLABELED), 0, MR, mask)
    for axis in range(3):
        for number in range(view.shape[axis]):
            (tmp_path / f"{axis}-{number}").write_bytes(view.image_slice(axis, number))
    script = f"""
      const fs = require("fs");
      const painting = require({json.dumps(str(PAGE / "painting.js"))});
      const shape = {json.dumps(view.shape)};
      const mask = Uint8Array.from({json.dumps(view.to_page(mask).reshape(-1).tolist())});
      let wrong = 0, seen = 0;
      for (let axis = 0; axis < 3; axis += 1)
        for (let slice = 0; slice < shape[axis]; slice += 1) {{
          const bytes = fs.readFileSync({json.dumps(str(tmp_path))} + `/${{axis}}-${{slice}}`);
          const [rows, columns] = painting.sliceSize(shape, axis);
          for (let row = 0; row < rows; row += 1)
            for (let column = 0; column < columns; column += 1) {{
              const bright = bytes.readUInt16LE(2 * (row * columns + column)) > 30000;
              seen += 1;
              wrong += bright !== (mask[painting.voxelAt(shape, axis, slice, row, column)] === 1);
            }}
        }}
      console.log(JSON.stringify([wrong, seen]));
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [0, 3 * bright.size]


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's scripts, is not installed")
def test_the_brush_draws_millimetres_and_undo_brings_everything_back() -> None:
    script = f"""
      const {{ drawDisc, drawLine, Strokes, voxelAt, MOST_STROKES }} = require({json.dumps(str(PAGE / "painting.js"))});
      const shape = [20, 21, 9], spacing = [1, 1, 3];
      const mask = new Uint8Array(20 * 21 * 9), history = new Strokes();
      const changed = (voxel, before) => history.record(voxel, before);
      const count = () => mask.reduce((sum, each) => sum + (each > 0), 0);
      const counts = [];
      history.begin(); drawDisc(mask, shape, spacing, 2, 4, 10, 10, 3, 1, changed); counts.push(count());
      const inside = mask[voxelAt(shape, 2, 4, 10, 13)], outside = mask[voxelAt(shape, 2, 4, 10, 14)];
      history.begin(); drawDisc(mask, shape, spacing, 1, 10, 4, 10, 3, 2, changed); counts.push(count());
      history.begin(); drawLine(mask, shape, spacing, 2, 0, [0, 0], [20, 19], 0, 1, changed); counts.push(count());
      history.begin(); drawDisc(mask, shape, spacing, 2, 4, -50, 500, 3, 1, changed); counts.push(count());
      history.undo(mask); counts.push(count());
      history.undo(mask); counts.push(count());
      history.undo(mask); counts.push(count());
      const more = history.undo(mask);
      for (let k = 0; k < 2 * MOST_STROKES; k += 1) history.begin();
      console.log(JSON.stringify({{ counts, inside, outside, more, bound: history.strokes.length <= MOST_STROKES }}));
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert found["counts"][0] == sum(x * x + y * y <= 9 for x in range(-3, 4) for y in range(-3, 4))
    assert (found["inside"], found["outside"], found["more"], found["bound"]) == (1, 0, False, True)
    first, both, line, *undone = found["counts"]
    assert line - both >= 21  # a diagonal without gaps, drawn elsewhere
    assert undone == [line, both, first, 0]


def test_a_real_scan_is_shown_and_its_mask_comes_back(left_atrium: Path) -> None:
    """A bright pool of blood lies in the middle of the thorax, so its axial slice is bright inside the true label."""
    image = next(iter(sorted((left_atrium / "images").iterdir())))
    case = Case("a", (image,), left_atrium / "labels" / image.name, Role.LABELED)
    label, grid = load_original_label(case, tiny_plan("pseudo_labels=null"))
    view = View(case, 0, MR, label.numpy())
    page = view.to_page(label.numpy())
    assert np.array_equal(view.from_page(page), label.numpy())
    assert sorted(view.shape) == sorted(grid.shape)
    fullest = int(page.sum((1, 2)).argmax())
    shown = np.frombuffer(view.image_slice(2, fullest), "<u2").reshape(page.shape[1:])
    assert shown[page[fullest] == 1].mean() > 1.5 * shown[page[fullest] == 0].mean()
    assert len(encode(page)) < page.size / 20


def test_the_plane_of_acquisition_is_shown_first_and_windows_are_wide_enough(tmp_path: Path) -> None:
    for spacing, axis in (((1.0, 1.0, 1.0), 2), ((1.0, 1.0, 5.0), 2), ((5.0, 1.0, 1.0), 0), ((1.0, 4.0, 1.1), 1)):
        image = write_nifti(tmp_path / "a.nii.gz", np.zeros((6, 6, 6), np.float32), np.diag([*spacing, 1]))
        view = View(Case("a", (image,), None, Role.UNLABELED), 0, MR, np.zeros((6, 6, 6), np.uint8))
        assert view.axis == axis
        assert len(view.windows) == 3
        assert all(each.upper > each.lower for each in view.windows)
    ct = View(
        Case("a", (image,), None, Role.UNLABELED), 0, Intensity(kind="window", lower=-160, upper=240), view_mask()
    )
    assert (ct.windows[1].lower, ct.windows[1].upper) == (-160, 240)


def view_mask() -> NDArray[np.uint8]:
    return np.zeros((6, 6, 6), np.uint8)
