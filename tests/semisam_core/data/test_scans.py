"""Scans onto the plan's grid and predictions back; NaN; and prepared copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semisam_core.data.cases import Case, Role
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import load_original_label, load_scan, resample, to_original
from semisam_core.errors import CaseError
from semisam_core.plan import Plan, plan_from_json
from tests.conftest import blob, tiny_plan
from tests.semisam_core.data.files import AFFINE, load, stored_along, the_case, write_pair, write_volume

AXES = st.permutations(["RL", "AP", "SI"]).flatmap(lambda pairs: st.tuples(*(st.sampled_from(pair) for pair in pairs)))
ZERO = "data.nan=zero"


def _geometry(shape: tuple[int, int, int], spacing: float, start_mm: float = 0.0) -> Geometry:
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = start_mm
    return Geometry(shape, affine)


def _right_mm(grid: Geometry) -> Tensor:
    """Return how far right each voxel's centre lies, (1, X, Y, Z)."""
    right = grid.affine[0, 0] * torch.arange(grid.shape[0]) + grid.affine[0, 3]
    return right.float()[None, :, None, None].expand(1, *grid.shape).contiguous()


def test_a_scan_already_on_the_grid_keeps_its_voxels(tmp_path: Path) -> None:
    scan = load(write_pair(tmp_path))
    assert scan.image.shape == (1, 24, 24, 16)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), blob()[1])
    assert float(scan.image.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scan.image.std()) == pytest.approx(1, abs=1e-3)


@settings(deadline=None, max_examples=12)
@given(axes=AXES)
def test_any_orientation_is_undone(tmp_path_factory: pytest.TempPathFactory, axes: tuple[str, str, str]) -> None:
    image, label = blob((24, 20, 16))
    turned_image, affine = stored_along(image, AFFINE, axes)
    turned_label, _ = stored_along(label, AFFINE, axes)
    scan = load(write_pair(tmp_path_factory.mktemp("site"), turned_image, turned_label, affine))
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), label)
    back = to_original(scan.label[None].float(), scan)
    assert np.array_equal(back[0].round().numpy().astype(np.uint8), turned_label)


def test_spacing_is_changed_and_undone(tmp_path: Path) -> None:
    image, label = blob((48, 40, 20))
    scan = load(write_pair(tmp_path, image, label, np.diag([1.0, 1.0, 3.0, 1.0])))
    assert scan.grid.spacing_mm == pytest.approx((2.0, 2.0, 2.0), abs=1e-5)
    assert scan.label is not None
    back = to_original(scan.label[None].float(), scan)[0] > 0.5
    assert back.shape == label.shape
    overlap = 2 * (back.numpy() & (label > 0)).sum() / (back.numpy().sum() + label.sum())
    assert overlap > 0.9


def test_resampled_labels_keep_to_their_classes(tmp_path: Path) -> None:
    label = np.zeros((24, 24, 16), np.uint8)
    label[5:15, 5:15, 4:12] = 3
    classes = "task.classes=[{name: a, value: 1}, {name: b, value: 2}, {name: c, value: 3}]"
    scan = load(write_pair(tmp_path, label=label), classes, "data.spacing_mm=[1.3, 1.7, 0.9]")
    assert scan.label is not None
    assert scan.label.unique().tolist() == [0, 3]


@pytest.mark.parametrize(("spacing", "start_mm"), [(0.7, 3.0), (1.0, 2.5), (3.0, 4.0)])
def test_resampling_keeps_every_value_where_it_is_in_the_patient(spacing: float, start_mm: float) -> None:
    source, target = _geometry((20, 6, 6), 2.0), _geometry((10, 3, 3), spacing, start_mm)
    assert torch.allclose(resample(_right_mm(source), source, target), _right_mm(target), atol=1e-3)


def test_beyond_the_source_values_stay_those_of_its_edge() -> None:
    source, target = _geometry((10, 6, 6), 2.0), _geometry((20, 10, 10), 2.0, -6.0)
    moved = resample(_right_mm(source), source, target)
    assert torch.allclose(moved, _right_mm(target).clamp(0.0, 18.0), atol=1e-3)


def test_predictions_cover_files_that_extend_beyond_the_plans_grid(tmp_path: Path) -> None:
    image, label = blob((23, 23, 23))  # centres up to 44 mm
    scan = load(write_pair(tmp_path, image, label), "data.spacing_mm=[7.0, 7.0, 7.0]")
    assert scan.grid.shape == (7, 7, 7)  # centres up to 42 mm
    back = to_original(torch.ones((2, *scan.grid.shape)), scan)
    assert torch.allclose(back, torch.ones(2, 23, 23, 23), atol=1e-4)


def test_a_windowed_scan_lies_between_zero_and_one(tmp_path: Path) -> None:
    scan = load(write_pair(tmp_path), "data.intensity={kind: window, lower: 0, upper: 50}")
    assert float(scan.image.min()) == 0.0
    assert float(scan.image.max()) == 1.0


def test_an_unlabeled_case_has_no_label_to_read(tmp_path: Path, plan: Plan) -> None:
    case = Case("a", (write_pair(tmp_path) / "images" / "a.nii.gz",), None, Role.UNLABELED)
    assert load_scan(case, plan).label is None
    with pytest.raises(CaseError, match="no label to read"):
        load_original_label(case, plan)


def _with_missing(where: Callable[[Any], Any]) -> Any:
    image, label = blob()
    return np.where(where(label), np.nan, image).astype(np.float32)


def _corner(label: Any) -> Any:
    missing = np.zeros(label.shape, bool)
    missing[:3] = True
    return missing


def test_nan_is_refused_unless_the_plan_says_otherwise(tmp_path: Path) -> None:
    write_pair(tmp_path, _with_missing(_corner))
    with pytest.raises(
        CaseError, match=r"1152 NaN or infinite voxels.*background only, the plan may say data.nan: zero"
    ):
        load(tmp_path)


def test_a_background_of_nan_becomes_zero_where_the_plan_says_so(tmp_path: Path) -> None:
    write_pair(tmp_path, np.where(_corner(blob()[1]), 0, blob()[0]).astype(np.float32))
    expected = load(tmp_path)
    write_pair(tmp_path, _with_missing(_corner))
    found = load(tmp_path, ZERO)
    assert torch.equal(found.image, expected.image)
    assert found.notes == ("1152 NaN voxels were set to 0, as the plan's data.nan says",)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (_with_missing(lambda label: label > 0), "NaN where the label marks a structure"),
        (_with_missing(lambda label: label >= 0), "every voxel of a channel is NaN"),
        (np.where(blob()[1] == 0, np.inf, blob()[0]), "NaN or infinite voxels"),
    ],
)
def test_nan_beyond_the_background_and_infinity_are_always_refused(tmp_path: Path, image: Any, says: str) -> None:
    write_pair(tmp_path, image)
    with pytest.raises(CaseError, match=says):
        load(tmp_path, ZERO)


def test_the_canonical_plan_has_nan_only_if_it_is_used() -> None:
    assert tiny_plan("data.nan=refuse").hash == tiny_plan().hash
    assert '"nan"' not in tiny_plan().canonical_json()
    assert tiny_plan(ZERO).hash != tiny_plan().hash
    assert plan_from_json(tiny_plan(ZERO).canonical_json()).data.nan == "zero"


def test_a_prepared_scan_is_the_same_scan(tmp_path: Path, plan: Plan) -> None:
    case = the_case(write_pair(tmp_path))
    fresh = load_scan(case, plan)
    for _ in range(2):
        kept = load_scan(case, plan, tmp_path / "prepared")
        assert torch.equal(kept.image, fresh.image)
        assert kept.label is not None
        assert fresh.label is not None
        assert torch.equal(kept.label, fresh.label)
        assert torch.allclose(kept.original.affine, fresh.original.affine)
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_a_changed_file_is_prepared_again_and_a_damaged_copy_is_replaced(tmp_path: Path, plan: Plan) -> None:
    case = the_case(write_pair(tmp_path))
    before = load_scan(case, plan, tmp_path / "prepared")
    write_volume(case.images[0], blob(seed=9)[0])
    assert not torch.equal(load_scan(case, plan, tmp_path / "prepared").image, before.image)
    for path in (tmp_path / "prepared").iterdir():
        path.write_bytes(b"torn")
    load_scan(case, plan, tmp_path / "prepared")
    assert sorted(path.stat().st_size > 4 for path in (tmp_path / "prepared").iterdir()) == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        "data.spacing_mm=[2.0, 2.0, 3.0]",
        "data.intensity={kind: window, lower: 0, upper: 50}",
        "task.classes=[{name: a, value: 1}, {name: b, value: 2}]",
        "task.ignore_other_values=true",
        ZERO,
    ],
)
def test_a_scan_is_prepared_again_for_a_plan_that_reads_it_differently(tmp_path: Path, change: str) -> None:
    case, prepared = the_case(write_pair(tmp_path)), tmp_path / "prepared"
    for plan in (tiny_plan(), tiny_plan(change), tiny_plan("seed=3")):
        load_scan(case, plan, prepared)
    assert len(list(prepared.iterdir())) == 2


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
