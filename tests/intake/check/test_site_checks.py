"""Each fault across cases trips its check; a clean site trips none (see `test_case_checks`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from client.site_config import load_site_config
from intake.check.alike import FEWEST, outliers, sharing
from intake.check.examine import channel_names
from intake.check.findings import Severity
from intake.check.patients import name_groups, patients_of, read_patients
from intake.check.site_checks import SITE_CHECKS
from tests.conftest import tiny_plan, write_nifti
from tests.intake.check.sites import MM, checked, clean_data, found, patient, site_yaml
from tests.intake.check.test_case_checks import two_classes

STRAIGHT = np.diag([MM, MM, MM, 1.0])


def _resaved(data: Path, source: str, target: str) -> None:
    """Save one case's image under another name, header, voxel order, voxel type and compression."""
    file = nib.load(data / "images" / f"{source}.nii.gz")
    turned = file.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    (data / "images" / f"{target}.nii.gz").unlink()
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj, np.float64), turned.affine), data / "images" / f"{target}.nii")


def _stripped(data: Path, source: str, target: str) -> None:
    """Save one case's voxels under another name without the geometry."""
    voxels = np.asarray(nib.load(data / "images" / f"{source}.nii.gz").dataobj)
    write_nifti(data / "images" / f"{target}.nii.gz", voxels, np.diag([-MM, -MM, MM, 1.0]))


def _changed_copy(data: Path) -> None:
    image = np.asarray(nib.load(data / "images" / "case-1.nii.gz").dataobj) * 3.0 + 7.0
    noisy = image + np.random.default_rng(0).normal(0, 2, image.shape)
    write_nifti(data / "images" / "case-2.nii.gz", noisy.astype(np.float32))


def _rewritten(
    case: int, change: Callable[[Any, Any], tuple[Any, Any]], affine: Any = STRAIGHT
) -> Callable[[Path], object]:
    image, label = change(*patient(case))
    name = f"case-{case}.nii.gz"
    return lambda data: (
        write_nifti(data / "images" / name, image, affine),
        write_nifti(data / "labels" / name, label, affine),
    )


def _manifest(data: Path) -> None:
    entries = [{"case": "case-2", "patient": "p"}, {"case": "case-9", "patient": "p"}, {"case": "case-1"}, 7]
    (data / "manifest.json").write_text(json.dumps({"version": 1, "cases": entries}))


def _renamed(data: Path) -> None:
    for old, new in (("case-3", "patient07_ed"), ("case-9", "patient07_es")):
        for kind in ("images", "labels"):
            (data / kind / f"{old}.nii.gz").rename(data / kind / f"{new}.nii.gz")


def _same_channels(data: Path) -> None:
    for k in range(10):
        image = data / "images" / f"case-{k}.nii.gz"
        other = image.read_bytes()
        image.rename(data / "images" / f"case-{k}_0000.nii.gz")
        second = data / "images" / f"case-{k}_0001.nii.gz"
        if k == 4:
            second.write_bytes(other)
        else:
            write_nifti(second, patient(50 + k)[0])


def _nodule_only_in_one(data: Path) -> None:
    for k in range(1, 10):
        label = patient(k)[1]
        write_nifti(data / "labels" / f"case-{k}.nii.gz", np.where(label == 2, 0, label).astype(np.uint8))


def _no_nodule_in_validation(data: Path) -> None:
    label = patient(9)[1]
    write_nifti(data / "labels" / "case-9.nii.gz", np.where(label == 2, 0, label).astype(np.uint8))


def _no_scan(data: Path) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(b"no scan")


def _smaller(image: Any, label: Any) -> tuple[Any, Any]:
    kept = np.zeros_like(label)
    kept[10:12, 10:12, 7:9] = 1
    return image, np.where(label == 2, 2, kept).astype(np.uint8)


@dataclass(frozen=True)
class Fault:
    """What is done to the site, and the case and a word that the check must name."""

    case: str | None
    word: str
    plant: Callable[[Path], object] = lambda data: None
    plan: tuple[str, ...] = ()
    site: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Fault] = {
    "usable": Fault(None, "no case can be read", _no_scan),
    "leak-content": Fault("case-0", "case-0, case-9", lambda data: _resaved(data, "case-0", "case-9")),
    "leak-patient": Fault("case-2", "case-2, case-9", _manifest),
    "leak-name": Fault("patient07_ed", "patient07", _renamed, site={"validation": ["patient07_es"]}),
    "duplicate": Fault("case-0", "case-0, case-3", lambda data: _stripped(data, "case-0", "case-3")),
    "near-duplicate": Fault("case-1", "case-1 and case-2", _changed_copy),
    "duplicate-label": Fault("case-5", "case-5, case-6", _rewritten(6, lambda image, _: (image, patient(5)[1]))),
    "duplicate-channel": Fault("case-4", "mr, t2", _same_channels, ("task.channels=[mr, t2]",)),
    "labeled": Fault(None, "no case is labeled", site={"labeled": []}),
    "classes": Fault(None, "no validation label marks nodule", _no_nodule_in_validation),
    "rare-class": Fault(None, "only 1 of 10 labels mark nodule (case-0)", _nodule_only_in_one),
    "stored-axes": Fault("case-7", "LPS", _rewritten(7, lambda *pair: pair, np.diag([-MM, -MM, MM, 1.0]))),
    "spacing-outlier": Fault("case-7", "2 x 2 x 6 mm", _rewritten(7, lambda *pair: pair, np.diag([MM, MM, 6.0, 1.0]))),
    "shape-outlier": Fault(
        "case-7", "24 x 22 x 32", _rewritten(7, lambda *pair: tuple(np.repeat(x, 2, 2) for x in pair))
    ),
    "intensity-outlier": Fault("case-7", "mr reaches", _rewritten(7, lambda image, label: (image * 100, label))),
    "volume-outlier": Fault("case-7", "organ measures 0.064 ml", _rewritten(7, _smaller)),
}


def test_every_check_has_a_fault_that_trips_it() -> None:
    assert set(FAULTS) == {check.name for check in SITE_CHECKS}


@pytest.mark.parametrize("check", SITE_CHECKS, ids=lambda check: check.name)
def test_a_fault_trips_its_check_and_is_described(check: Any, tmp_path: Path) -> None:
    fault = FAULTS[check.name]
    fault.plant(clean_data(tmp_path))
    result = checked(tmp_path, two_classes(*fault.plan), **({"validation": ["case-9"]} | fault.site))
    said = found(result, check.name)
    assert [case for case, _ in said] == [fault.case]
    assert fault.word in said[0][1]
    assert all(f.severity is check.severity for f in result.findings if f.check == check.name)


def test_a_class_that_no_label_marks_is_named(tmp_path: Path) -> None:
    _nodule_only_in_one(clean_data(tmp_path))
    (tmp_path / "data" / "labels" / "case-0.nii.gz").unlink()
    result = checked(tmp_path, two_classes(), validation=["case-9"])
    assert "no label marks nodule" in found(result, "classes")[0][1]


def test_a_case_listed_with_a_label_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 3)
    (data / "labels" / "case-1.nii.gz").unlink()
    (data / "labels" / "case-7.nii.gz").write_bytes(b"")
    result = checked(tmp_path, two_classes(), labeled=["case-0", "case-1"], validation=["case-2"])
    listed = {f.case: f.severity for f in result.findings if f.check == "listed"}
    assert listed == {"case-1": Severity.PROBLEM, "case-7": Severity.WARNING}


def test_a_site_with_nothing_to_learn_from_is_a_problem(tmp_path: Path) -> None:
    clean_data(tmp_path, 2)
    plan = tiny_plan()  # with a generalist that the site lacks
    assert "nothing to learn from" in found(checked(tmp_path, plan, labeled=[]), "listed")[0][1]


def test_without_a_plan_the_checks_that_need_one_are_listed_as_not_done(tmp_path: Path) -> None:
    _manifest(clean_data(tmp_path))
    result = checked(tmp_path, None, validation=["case-9"])
    needed = {"window", "label-values", "background-nan", "modality", "label-unlisted", "label-in-body", "classes"}
    assert {each.check for each in result.not_done} == needed
    assert not needed & set(result.done)
    assert found(result, "leak-patient")


def test_few_cases_and_unknown_patients_are_said_to_be_unchecked(tmp_path: Path) -> None:
    clean_data(tmp_path, FEWEST - 1)
    skipped = {each.check for each in checked(tmp_path, two_classes()).not_done}
    assert {"spacing-outlier", "intensity-outlier", "leak-patient"} <= skipped


def test_two_scales_at_one_site_are_one_finding(tmp_path: Path) -> None:
    data = clean_data(tmp_path)
    for k in range(4):
        write_nifti(data / "images" / f"case-{k}.nii.gz", patient(k)[0] * 1000)
    (case, said), *more = found(checked(tmp_path, two_classes(), validation=["case-9"]), "intensity-outlier")
    assert (case, more) == (None, [])
    assert "4 of 10 cases" in said


def test_a_manifest_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 2)
    (data / "manifest.json").write_text("{")
    assert "cannot be read" in found(checked(tmp_path, two_classes()), "manifest")[0][1]


@pytest.mark.parametrize(
    ("names", "labels", "channels"),
    [
        (["a_0000", "a_0001", "b_0000", "b_0001"], ["a"], ("channel 0", "channel 1")),
        (["la_0000", "la_0001", "la_0002"], ["la_0000", "la_0001"], ("image",)),
        (["a_0000", "b_0000"], ["a"], ("image",)),
        (["a_0000", "a_0001", "b_0000"], [], ("image",)),
        (["a", "b"], ["a"], ("image",)),
    ],
)
def test_without_a_plan_names_tell_the_channels(
    names: list[str], labels: list[str], channels: tuple[str, ...], tmp_path: Path
) -> None:
    for kind, stems in (("images", names), ("labels", labels)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for stem in stems:
            (tmp_path / "data" / kind / f"{stem}.nii.gz").touch()
    assert channel_names(load_site_config(site_yaml(tmp_path))) == channels


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["case", "patient", "x"]), inner),
    max_leaves=12,
)


@given(JSON)
def test_any_manifest_gives_names_or_a_reason(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "manifests" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"cases": content} if isinstance(content, list) else content))
    patients, reason = read_patients(folder)
    assert (reason is None) == isinstance(content, list)
    assert all(isinstance(text, str) for pair in patients.items() for text in pair)
    if isinstance(content, list):
        assert patients == patients_of(content)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["p1_ed", "p1_es", "p2_ed"], {"p1": ["p1_ed", "p1_es"]}),
        (["la_001", "la_002"], {}),
        (["atrium2018_001", "atrium2018_002"], {}),
        (["a", "b1"], {}),
    ],
)
def test_names_suggest_a_patient_only_where_a_numbered_part_is_shared_by_some(
    names: list[str], groups: dict[str, list[str]]
) -> None:
    assert name_groups(names) == groups


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.integers(0, 6), max_size=3), min_size=1))
def test_groups_are_the_connected_components_of_shared_keys(keys: dict[str, list[int]]) -> None:
    names = sorted(keys)
    shared = [[bool(set(keys[first]) & set(keys[second])) for second in names] for first in names]
    component = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(shared))[1]
    groups = [[name for name, which in zip(names, component, strict=True) if which == k] for k in range(len(names))]
    assert sharing(keys) == sorted(group for group in groups if len(group) > 1)


@given(st.lists(st.floats(-1, 1), min_size=FEWEST, max_size=30), st.floats(3.0, 1e6), st.sampled_from([-1, 1]))
def test_a_far_value_is_an_outlier_wherever_it_stands_and_values_close_together_are_not(
    values: list[float], far: float, sign: int
) -> None:
    close = [0.01 * value for value in values]
    assert not outliers(close, floor=0.05).any()
    assert outliers([*close, sign * far], floor=0.05).tolist() == [False] * len(close) + [True]
    assert not outliers([*close[: FEWEST - 2], far], floor=0.05).any(), "too few to tell"
