"""Scans onto the plan's grid and predictions back, and everything that is wrong with a bad file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_original_label, load_scan, to_original
from semisam_core.errors import CaseError
from semisam_core.plan import Plan
from tests.conftest import blob, tiny_plan, write_nifti

AXES = st.permutations(["RL", "AP", "SI"]).flatmap(lambda pairs: st.tuples(*(st.sampled_from(pair) for pair in pairs)))


def _case(folder: Path, image: Any = None, label: Any = None, role: Role = Role.LABELED, affine: Any = None) -> Case:
    default_image, default_label = blob()
    images = (write_nifti(folder / "i.nii.gz", default_image if image is None else image, affine),)
    if role is Role.UNLABELED:
        return Case("case", images, None, role)
    return Case(
        "case", images, write_nifti(folder / "l.nii.gz", default_label if label is None else label, affine), role
    )


def test_a_scan_already_on_the_grid_keeps_its_voxels(tmp_path: Path, plan: Plan) -> None:
    scan = load_scan(_case(tmp_path), plan)
    assert scan.image.shape == (1, 24, 24, 16)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), blob()[1])
    assert float(scan.image.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scan.image.std()) == pytest.approx(1, abs=1e-3)


@settings(deadline=None, max_examples=12)
@given(axes=AXES)
def test_orientation_is_undone_whatever_the_file_uses(axes: tuple[str, str, str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        image, label = blob((24, 20, 16))
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        change = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
        turned = [nib.orientations.apply_orientation(each, change) for each in (image, label)]
        turned_affine = affine @ inv_ornt_aff(change, image.shape)
        case = _case(Path(folder), *turned, affine=turned_affine)
        scan = load_scan(case, tiny_plan())
        assert scan.label is not None
        assert np.array_equal(scan.label.numpy(), label)
        back = to_original(scan.label[None].float(), scan)
        assert np.array_equal(back[0].round().numpy().astype(np.uint8), turned[1])


def test_spacing_is_changed_and_undone(tmp_path: Path, plan: Plan) -> None:
    image, label = blob((48, 40, 20))
    case = _case(tmp_path, image, label, affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    scan = load_scan(case, plan)
    assert scan.grid.spacing_mm == pytest.approx((2.0, 2.0, 2.0), abs=1e-5)
    assert scan.label is not None
    back = to_original(scan.label[None].float(), scan)[0] > 0.5
    assert back.shape == label.shape
    overlap = 2 * (back.numpy() & (label > 0)).sum() / (back.numpy().sum() + label.sum())
    assert overlap > 0.9


def test_label_values_become_class_indices(tmp_path: Path) -> None:
    plan = tiny_plan("task.classes=[{name: first, value: 7}, {name: second, value: 3}]")
    label = np.zeros((24, 24, 16), np.uint8)
    label[:5], label[10:15] = 7, 3
    case = _case(tmp_path, label=label)
    indices, _ = load_original_label(case, plan)
    assert indices[0, 0, 0] == 1
    assert indices[12, 0, 0] == 2


UNION = "task.classes=[{name: whole, values: [4, 1, 2]}, {name: other, value: 3}]"


def _with_parts() -> Any:
    label = np.zeros((24, 24, 16), np.uint8)
    label[:4], label[4:8], label[8:12], label[12:16] = 1, 2, 4, 3
    return label


def test_the_values_of_a_union_become_one_class(tmp_path: Path) -> None:
    plan = tiny_plan(UNION)
    case = _case(tmp_path, label=_with_parts())
    expected = np.zeros((24, 24, 16), np.uint8)
    expected[:12], expected[12:16] = 1, 2
    assert np.array_equal(load_original_label(case, plan)[0].numpy(), expected)
    scan = load_scan(case, plan)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), expected)


def test_a_value_beside_a_union_is_foreign(tmp_path: Path) -> None:
    plan = tiny_plan("task.classes=[{name: whole, values: [1, 2, 4]}]")
    with pytest.raises(CaseError, match=r"the label has the values 3; the plan's classes accept \[0, 1, 2, 4\]"):
        load_scan(_case(tmp_path, label=_with_parts()), plan)


def test_a_scan_is_prepared_anew_for_a_plan_that_unites_other_values(tmp_path: Path) -> None:
    case = _case(tmp_path, label=_with_parts())
    plans = (
        tiny_plan(f"task.classes=[{classes}]")
        for classes in ("{name: a, values: [1, 2]}, {name: b, values: [3, 4]}", "{name: a, values: [1, 2, 3, 4]}")
    )
    labels = [load_scan(case, plan, tmp_path / "prepared").label for plan in plans]
    assert [int(label.max()) for label in labels if label is not None] == [2, 1]
    assert len(list((tmp_path / "prepared").iterdir())) == 2


def test_a_windowed_scan_lies_between_zero_and_one(tmp_path: Path) -> None:
    plan = tiny_plan("data.intensity={kind: window, lower: 0, upper: 50}")
    scan = load_scan(_case(tmp_path), plan)
    assert float(scan.image.min()) == 0.0
    assert float(scan.image.max()) == 1.0


def test_an_unlabeled_case_has_no_label_to_read(tmp_path: Path, plan: Plan) -> None:
    case = _case(tmp_path, role=Role.UNLABELED)
    assert load_scan(case, plan).label is None
    with pytest.raises(CaseError, match="no label to read"):
        load_original_label(case, plan)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((24, 24), np.float32), "2D"),
        (np.zeros((24, 24, 16, 2), np.float32), "4D"),
        (np.zeros((24, 24, 2), np.float32), "at least 4 voxels"),
        (np.where(blob()[1] > 0, np.nan, blob()[0]), "NaN or infinite"),
    ],
)
def test_an_image_that_is_no_finite_volume_is_a_bad_case(tmp_path: Path, plan: Plan, image: Any, says: str) -> None:
    with pytest.raises(CaseError, match=says):
        load_scan(_case(tmp_path, image), plan)


def test_a_truncated_file_is_a_bad_case(tmp_path: Path, plan: Plan) -> None:
    case = _case(tmp_path)
    content = case.images[0].read_bytes()
    case.images[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(CaseError, match="case: the image file cannot be read"):
        load_scan(case, plan)


def test_a_label_of_another_shape_is_a_bad_case(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(CaseError, match=r"label has shape \(23, 24, 16\), the image has \(24, 24, 16\)"):
        load_scan(_case(tmp_path, label=blob()[1][1:]), plan)


def test_a_label_that_lies_elsewhere_is_a_bad_case(tmp_path: Path, plan: Plan) -> None:
    case = _case(tmp_path)
    assert case.label is not None
    shifted = np.diag([2.0, 2.0, 2.0, 1.0])
    shifted[0, 3] = 4.0
    write_nifti(case.label, blob()[1], shifted)
    with pytest.raises(CaseError, match="affines differ by up to 4 mm"):
        load_scan(case, plan)


def test_a_label_with_foreign_values_is_a_bad_case(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(CaseError, match=r"the label has the values 5; the plan's classes accept \[0, 1\]"):
        load_scan(_case(tmp_path, label=5 * blob()[1]), plan)


def test_a_prepared_scan_is_the_same_scan(tmp_path: Path, plan: Plan) -> None:
    case = _case(tmp_path)
    fresh = load_scan(case, plan)
    for _ in range(2):
        kept = load_scan(case, plan, tmp_path / "prepared")
        assert torch.equal(kept.image, fresh.image)
        assert kept.label is not None
        assert fresh.label is not None
        assert torch.equal(kept.label, fresh.label)
        assert torch.allclose(kept.original.affine, fresh.original.affine)
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_a_changed_file_is_prepared_anew_and_a_damaged_copy_is_ignored(tmp_path: Path, plan: Plan) -> None:
    case = _case(tmp_path)
    before = load_scan(case, plan, tmp_path / "prepared")
    write_nifti(case.images[0], blob(seed=9)[0])
    assert not torch.equal(load_scan(case, plan, tmp_path / "prepared").image, before.image)
    for path in (tmp_path / "prepared").iterdir():
        path.write_bytes(b"torn")
    load_scan(case, plan, tmp_path / "prepared")


def test_real_scans_come_back_where_they_were(left_atrium: Path) -> None:
    name = sorted(path.name for path in (left_atrium / "images").glob("*.nii*"))[0]
    plan = tiny_plan("data.spacing_mm=[1.25, 1.25, 1.25]")
    case = Case("real", (left_atrium / "images" / name,), left_atrium / "labels" / name, Role.LABELED)
    scan = load_scan(case, plan)
    label, geometry = load_original_label(case, plan)
    assert scan.label is not None
    back = to_original(scan.label[None].float(), scan)[0] > 0.5
    assert tuple(back.shape) == geometry.shape
    assert 2 * int((back & (label > 0)).sum()) / (int(back.sum()) + int((label > 0).sum())) > 0.95


def test_other_label_values_are_background_only_where_the_plan_says_so(tmp_path: Path) -> None:
    label = blob()[1]
    more = label.copy()
    more[0, 0, :3] = (2, 7, 255)
    case, ignoring = _case(tmp_path, label=more), tiny_plan("task.ignore_other_values=true")
    scan = load_scan(case, ignoring, tmp_path / "prepared")
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), label)
    assert np.array_equal(load_original_label(case, ignoring)[0].numpy(), label)
    with pytest.raises(CaseError, match=r"the label has the values 2, 7, 255; the plan's classes accept \[0, 1\]"):
        load_scan(case, tiny_plan(), tmp_path / "prepared")


@pytest.mark.parametrize("value", [0.4, -1.0, float("nan")])
def test_what_is_no_label_value_at_all_is_never_ignored(tmp_path: Path, value: float) -> None:
    label = blob()[1].astype(np.float32)
    label[0, 0, 0] = value
    with pytest.raises(CaseError, match="the label has the values"):
        load_scan(_case(tmp_path, label=label), tiny_plan("task.ignore_other_values=true"))
