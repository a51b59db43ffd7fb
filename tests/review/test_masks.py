"""Masks come back to where they were on the scan's own grid, whatever its axes and spacing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from review.masks import label_bytes, mask_of, read_mask
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_scan
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore, StoredPseudoLabel
from tests.conftest import tiny_plan, write_nifti

TURNED = np.array([[0.0, 0, -1.5, 40], [-2.0, 0, 0, 30], [0, 3.0, 0, -20], [0, 0, 0, 1]])
PLAN = tiny_plan(
    "task.classes=[{name: one, value: 7}, {name: two, value: 200}]", "pseudo_labels=null", "data.spacing_mm=[1, 1, 1]"
)


def _stored(folder: Path, target: torch.Tensor, valid: tuple[bool, bool] = (True, True)) -> StoredPseudoLabel:
    label = PseudoLabel(target, torch.zeros_like(target), torch.tensor(valid), (None, None), target)
    PseudoLabelStore(folder).save("key", label, 3)
    stored = PseudoLabelStore(folder).open("key")
    assert stored is not None
    assert stored.round == 3
    return stored


def test_a_mask_is_where_its_structure_is(tmp_path: Path) -> None:
    truth = np.zeros((20, 16, 24), np.uint8)
    truth[4:10, 3:9, 6:15], truth[12:17, 8:13, 3:20] = 1, 2
    image = write_nifti(tmp_path / "images" / "a.nii.gz", truth.astype(np.float32) * 100, TURNED)
    label = write_nifti(tmp_path / "a.nii.gz", np.array([0, 7, 200], np.uint8)[truth], TURNED)
    scan = load_scan(Case("a", (image,), label, Role.LABELED), PLAN)
    assert scan.label is not None
    target = torch.stack([(scan.label == k).float() for k in (1, 2)])
    found = mask_of(_stored(tmp_path / "store", target), scan)
    for k in (1, 2):
        assert 2 * ((found == k) & (truth == k)).sum() / ((found == k).sum() + (truth == k).sum()) > 0.85
    inner = np.zeros_like(truth, bool)
    inner[5:9, 4:8, 7:14] = True
    assert (found[inner] == 1).all()


def test_of_two_classes_the_likelier_one_counts_and_what_is_unlikely_is_background(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "images" / "a.nii.gz", np.random.default_rng(0).normal(0, 1, (8, 8, 8)), np.eye(4))
    scan = load_scan(Case("a", (image,), None, Role.UNLABELED), PLAN)
    target = torch.zeros(2, *scan.grid.shape)
    target[:, 2:4], target[0, 5], target[1, 6] = torch.tensor([0.6, 0.9])[:, None, None, None], 0.45, 0.55
    found = mask_of(_stored(tmp_path / "store", target), scan)
    assert [set(np.unique(found[k]).tolist()) for k in (2, 5, 6)] == [{2}, {0}, {2}]


def test_a_label_file_holds_the_plans_values_and_reads_back_the_same(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "images" / "a.nii.gz", np.zeros((6, 5, 7), np.float32), TURNED)
    mask = np.random.default_rng(1).integers(0, 3, (6, 5, 7)).astype(np.uint8)
    case = Case("a", (image,), None, Role.UNLABELED)
    grid = load_scan(case, PLAN).original
    content = label_bytes(mask, grid, PLAN.task, image)
    assert content == label_bytes(mask, grid, PLAN.task, image)
    (tmp_path / "mask.nii.gz").write_bytes(content)
    again, where = read_mask(tmp_path / "mask.nii.gz", case, PLAN)
    assert np.array_equal(again, mask)
    assert torch.equal(where.affine, grid.affine)
