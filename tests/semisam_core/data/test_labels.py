"""Label values: rounding, classes, and refusal of everything else."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom

from semisam_core.data.labels import class_indices
from semisam_core.data.scans import load_original_label, load_scan
from semisam_core.errors import CaseError
from tests.conftest import blob, tiny_plan
from tests.semisam_core.data.files import load, the_case, write_pair, write_volume

UNION = "task.classes=[{name: whole, values: [4, 1, 2]}, {name: other, value: 3}]"
IGNORING = "task.ignore_other_values=true"


def _parts() -> Any:
    label = np.zeros((24, 24, 16), np.uint8)
    label[:4], label[4:8], label[8:12], label[12:16] = 1, 2, 4, 3
    return label


def test_label_values_become_class_indices(tmp_path: Path) -> None:
    label = np.zeros((24, 24, 16), np.uint8)
    label[:5], label[10:15] = 7, 3
    plan = tiny_plan("task.classes=[{name: first, value: 7}, {name: second, value: 3}]")
    indices, _ = load_original_label(the_case(write_pair(tmp_path, label=label)), plan)
    assert (int(indices[0, 0, 0]), int(indices[12, 0, 0]), int(indices[20, 0, 0])) == (1, 2, 0)


def test_the_values_of_a_union_become_one_class(tmp_path: Path) -> None:
    expected = np.zeros((24, 24, 16), np.uint8)
    expected[:12], expected[12:16] = 1, 2
    scan = load(write_pair(tmp_path, label=_parts()), UNION)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), expected)


def test_a_value_of_no_class_is_refused_with_the_accepted_ones(tmp_path: Path) -> None:
    write_pair(tmp_path, label=_parts())
    with pytest.raises(CaseError, match=r"the label has the values 3; the plan's classes accept \[0, 1, 2, 4\]\.$"):
        load(tmp_path, "task.classes=[{name: whole, values: [1, 2, 4]}]")


def test_other_whole_numbers_are_background_where_the_plan_says_so(tmp_path: Path) -> None:
    label = blob()[1]
    more = label.copy()
    more[0, 0, :3] = (2, 7, 255)
    write_pair(tmp_path, label=more)
    scan = load(tmp_path, IGNORING)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), label)
    with pytest.raises(CaseError, match=r"the label has the values 2, 7, 255; the plan's classes accept \[0, 1\]"):
        load(tmp_path)


@pytest.mark.parametrize("value", [0.4, -1.0, float("nan"), float("inf")])
def test_values_that_cannot_be_labels_are_never_ignored(tmp_path: Path, value: float) -> None:
    label = blob()[1].astype(np.float32)
    label[0, 0, 0] = value
    write_pair(tmp_path, label=label)
    with pytest.raises(CaseError, match="the label has the values"):
        load(tmp_path, IGNORING)


@pytest.mark.parametrize("stored_as", [np.uint8, np.int16])
def test_labels_saved_with_a_scale_factor_are_rounded_and_the_site_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored_as: type
) -> None:
    marked = 4 * blob()[1].astype(np.float32)
    marked[0, 0, :4] = (0.1, 1, 2, 3)  # no whole number: it makes nibabel scale
    marked[0, 0, 0] = 0
    write_pair(tmp_path)
    write_volume(tmp_path / "labels" / "a.nii.gz", marked * np.float32(1.0001), stored_as=stored_as)
    with caplog.at_level(logging.WARNING):
        scan = load(tmp_path, UNION)
    assert scan.label is not None
    assert set(scan.label.unique().tolist()) == {0, 1, 2}
    assert int((scan.label == 1).sum()) == int((np.rint(marked) != 3).sum() - (marked == 0).sum())
    (note,) = scan.notes
    assert re.fullmatch(r"label values such as \d\.\d+ were rounded to whole numbers", note)
    assert caplog.messages == [f"a: {note}."]


@pytest.mark.parametrize("one", [0.9999, 1.00002, 1.00392, 1.02, 0.98, 1 + 1e-7])
def test_values_near_a_whole_number_are_that_number(tmp_path: Path, one: float) -> None:
    label = blob()[1] * np.float32(one)
    label[blob()[1] == 0] = 0.00392  # of a scaled background
    write_pair(tmp_path, label=label)
    scan = load(tmp_path)
    assert scan.label is not None
    assert np.array_equal(scan.label.numpy(), blob()[1])
    assert len(scan.notes) == 1
    indices, _ = load_original_label(the_case(tmp_path), tiny_plan())
    assert np.array_equal(indices.numpy(), blob()[1])


def test_whole_numbers_leave_no_note(tmp_path: Path) -> None:
    assert load(write_pair(tmp_path)).notes == ()


def test_an_interpolated_label_is_refused_with_how_to_resample_it(tmp_path: Path) -> None:
    coarse = zoom(blob()[1].astype(np.float32), 0.5, order=1)
    write_pair(tmp_path, label=zoom(coarse, 2, order=1))
    with pytest.raises(CaseError, match="come from interpolation: resample labels with nearest neighbour"):
        load(tmp_path, IGNORING)


@example(values=[1.0000001, 1.03])
@example(values=[0.97, 2.0])
@example(values=[255.03])
@example(values=[5.0196])
@settings(deadline=None, max_examples=300)
@given(values=st.lists(st.floats(-2, 260, width=32) | st.integers(0, 260).map(float), min_size=1, max_size=8))
def test_a_refused_value_never_reads_as_an_accepted_one(values: list[float]) -> None:
    array = np.array(values, np.float32).reshape(-1, 1, 1)
    task = tiny_plan("task.classes=[{name: a, value: 1}, {name: b, values: [5, 255]}]").task
    accepted = {0: 0, 1: 1, 5: 2, 255: 2}
    near = np.abs(array - np.rint(array)) <= 0.02
    fits = near & np.isin(np.rint(array), list(accepted))
    if fits.all():
        indices, notes = class_indices(array, task, "a")
        assert indices.flatten().tolist() == [accepted[round(value)] for value in array.flatten().tolist()]
        assert bool(notes) == bool((array != np.rint(array)).any())
        return
    with pytest.raises(CaseError) as raised:
        class_indices(array, task, "a")
    said = re.search(r"has the values (.*); the plan's classes accept \[0, 1, 5, 255\]", str(raised.value))
    assert said is not None
    shown = [float(value) for value in said[1].removesuffix(", ...").split(", ")]
    assert shown
    assert not set(shown) & set(accepted)
    assert {np.float32(value) for value in shown} <= set(array[~fits].tolist())


def test_a_prepared_scan_keeps_its_notes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pair(tmp_path, label=blob()[1] * np.float32(0.9999))
    case, plan, prepared = the_case(tmp_path), tiny_plan(), tmp_path / "prepared"
    fresh = load_scan(case, plan, prepared)
    caplog.clear()
    kept = load_scan(case, plan, prepared)
    assert kept.notes == fresh.notes != ()
    assert torch.equal(kept.image, fresh.image)
    assert not caplog.messages  # logged once, when it was prepared
