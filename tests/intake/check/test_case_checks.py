"""Each fault of one case trips its check, and a clean site trips none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from intake.check import measure
from intake.check.case_checks import CASE_CHECKS
from intake.check.facts import Terms
from intake.check.findings import Severity
from intake.check.plausibility import modality_of
from intake.check.read import examine_case
from semisam_core.data.cases import Case, Role
from semisam_core.plan import Plan
from tests.conftest import tiny_plan, write_nifti
from tests.intake.check.sites import MM, checked, clean_data, found, patient

TWO_CLASSES = "task.classes=[{name: organ, value: 1}, {name: nodule, value: 2}]"
IMAGE, LABEL = patient(0)
STRAIGHT = np.diag([MM, MM, MM, 1.0])


def two_classes(*assignments: str) -> Plan:
    return tiny_plan(TWO_CLASSES, "pseudo_labels=null", "aggregation.minimum_sites=1", *assignments)


@dataclass(frozen=True)
class Fault:
    """What is done to case-0, under which plan and site file, and a word of the sentence."""

    word: str
    plant: Callable[[Path], object] = lambda data: None
    plan: tuple[str, ...] = ()
    site: dict[str, Any] = field(default_factory=dict)


def _image(change: Callable[[Any], Any], affine: Any = STRAIGHT) -> Callable[[Path], object]:
    return lambda data: write_nifti(data / "images" / "case-0.nii.gz", change(IMAGE.copy()), affine)


def _label(change: Callable[[Any], Any], affine: Any = STRAIGHT) -> Callable[[Path], object]:
    return lambda data: write_nifti(data / "labels" / "case-0.nii.gz", change(LABEL.copy()), affine)


def _both(affine: Any) -> Callable[[Path], object]:
    return lambda data: (_image(np.array, affine)(data), _label(np.array, affine)(data))


def _set(where: Any, value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[where] = value
        return array

    return change


def _turned(degrees: float) -> Any:
    affine = STRAIGHT.copy()
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() * MM
    return affine


def _sheared() -> Any:
    affine = STRAIGHT.copy()
    affine[0, 2] = 0.3
    return affine


def _truncated(data: Path) -> None:
    path = data / "images" / "case-0.nii.gz"
    path.write_bytes(path.read_bytes()[:3000])


def _no_orientation(data: Path) -> None:
    for kind, array in (("images", IMAGE), ("labels", LABEL)):
        file = nib.Nifti1Image(array, None)
        file.header.set_zooms((MM,) * 3)
        nib.save(file, data / kind / "case-0.nii.gz")


def _second_channel(data: Path) -> None:
    for k in range(3):
        (data / "images" / f"case-{k}.nii.gz").rename(data / "images" / f"case-{k}_0000.nii.gz")
        affine = np.diag([MM, MM, 3.0, 1.0]) if k == 0 else STRAIGHT
        write_nifti(data / "images" / f"case-{k}_0001.nii.gz", patient(50 + k)[0], affine)


def _away(label: Any) -> Any:
    moved = np.zeros_like(label)
    moved[:4, :4, 1:4] = 1
    return moved


def _centre_only(image: Any) -> Any:
    return np.where(np.arange(image.size).reshape(image.shape) == 4000, 7.0, 0.0).astype(np.float32)


FAULTS: dict[str, Fault] = {
    "readable": Fault("cannot be read", _truncated),
    "size": Fault("storage.memory_gb", site={"memory_gb": 1e-5}),
    "channels-grid": Fault("voxels", _second_channel, ("task.channels=[mr, t2]",)),
    "label-grid": Fault("does not lie on the image", _label(np.array, np.diag([3.0, MM, MM, 1.0]))),
    "finite": Fault(
        "1 NaN and 1 infinite", _image(lambda image: _set((1, 0, 0), np.inf)(_set((0, 0, 0), np.nan)(image)))
    ),
    "constant": Fault("all voxels have the same value", _image(np.zeros_like)),
    "window": Fault("plan's window 1000 to 2000", plan=("data.intensity={kind: window, lower: 1000, upper: 2000}",)),
    "label-whole": Fault("0.5", _label(lambda label: label * np.float32(0.5))),
    "label-values": Fault("accept [0, 1, 2]", _label(lambda label: label * 7)),
    "background-nan": Fault("1 NaN voxels of mr", _image(_set((0, 0, 0), np.nan)), ("data.nan=zero",)),
    "nearly-constant": Fault("99% of its voxels", _image(_centre_only)),
    "spacing": Fault("25 x 2 x 2 mm", _both(np.diag([25.0, MM, MM, 1.0]))),
    "orientation": Fault("no orientation", _no_orientation),
    "oblique": Fault("30 degrees", _both(_turned(30))),
    "sheared": Fault("right angle", _both(_sheared())),
    "converted": Fault("rounded to whole numbers", _label(lambda label: label * np.float32(0.9999))),
    "modality": Fault("-500", _image(_set((0, 0, 0), -500.0))),
    "label-empty": Fault("its label is empty", _label(np.zeros_like)),
    "label-unlisted": Fault("nodule", site={"labeled_classes": ["organ"]}),
    "label-specks": Fault("1 of 2 pieces of organ", _label(_set((3, 11, 8), 1))),
    "label-in-body": Fault("of organ lies outside of the body", _label(_away)),
    "label-at-border": Fault("organ (left)", _label(_set((slice(0, 8), 11, 8), 1))),
}


def test_every_check_has_a_fault_that_trips_it() -> None:
    assert list(FAULTS) == [check.name for check in CASE_CHECKS]


@pytest.mark.parametrize("check", CASE_CHECKS, ids=lambda check: check.name)
def test_a_fault_trips_its_check_and_is_described(check: Any, tmp_path: Path) -> None:
    fault = FAULTS[check.name]
    fault.plant(clean_data(tmp_path, 3))
    result = checked(tmp_path, two_classes(*fault.plan), **fault.site)
    said = dict(found(result, check.name))
    assert fault.word in said["case-0"]
    assert all(f.severity is check.severity and f.accepted for f in result.findings if f.check == check.name)
    if not fault.site and check.name != "window":
        assert list(said) == ["case-0"], "the other cases are clean"


def test_a_clean_site_trips_no_check(tmp_path: Path) -> None:
    clean_data(tmp_path)
    assert checked(tmp_path, two_classes(), validation=["case-9"]).findings == ()
    assert checked(tmp_path, None, validation=["case-9"]).findings == ()


def test_a_clean_ct_trips_no_check_and_one_without_air_does(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 2)
    for k in range(2):
        image = patient(k)[0] * 8 - 1024
        write_nifti(data / "images" / f"case-{k}.nii.gz", image if k else image + 1024)
    plan = two_classes("task.channels=[ct]", "data.intensity={kind: window, lower: -200, upper: 400}")
    assert [case for case, _ in found(checked(tmp_path, plan), "modality")] == ["case-0"]


def test_a_label_along_other_axes_than_its_image_is_measured_where_it_lies(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 2)
    before = checked(tmp_path, two_classes()).cases[0].label
    turned = nib.as_closest_canonical(nib.load(data / "labels" / "case-0.nii.gz"))
    flipped = turned.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(flipped, data / "labels" / "case-0.nii.gz")
    result = checked(tmp_path, two_classes())
    assert result.findings == ()
    assert before is not None
    assert result.cases[0].label is not None
    assert result.cases[0].label.classes == before.classes


def test_one_unreadable_study_does_not_stop_the_others(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 3)
    (data / "images" / "case-0.nii.gz").write_bytes(b"no scan")
    (data / "labels" / "case-1.nii.gz").write_bytes(b"")
    result = checked(tmp_path, two_classes())
    assert [case for case, _ in found(result, "readable")] == ["case-0", "case-1"]
    assert [bool(case.channels) for case in result.cases] == [False, True, True]


@pytest.mark.parametrize(("error", "check"), [(ValueError("odd"), "readable"), (MemoryError(), "size")])
def test_an_error_that_nobody_foresaw_is_a_finding_too(
    error: Exception, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_data(tmp_path, 3)
    usual = measure.miniature

    def fails_once(voxels: Any, geometry: Any) -> Any:
        monkeypatch.setattr(measure, "miniature", usual)
        raise error

    monkeypatch.setattr(measure, "miniature", fails_once)
    result = checked(tmp_path, two_classes())
    assert [case for case, _ in found(result, check)] == ["case-0"]
    assert [bool(case.channels) for case in result.cases] == [False, True, True]


def test_the_label_of_an_unlabeled_case_is_never_read(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 3)
    (data / "labels" / "case-1.nii.gz").write_bytes(b"must not be opened")
    result = checked(tmp_path, two_classes(), labeled=["case-0"], validation=["case-2"])
    assert result.findings == ()
    assert result.cases[1].role is Role.UNLABELED
    assert result.cases[1].label is None


@pytest.mark.parametrize(
    ("channel", "modality"),
    [("ct", "CT"), ("lge-mr", "MR"), ("flair", "MR"), ("pet", "PET"), ("T1w", "MR"), ("pet-ct", None), ("image", None)],
)
def test_a_channels_name_says_its_modality(channel: str, modality: str | None) -> None:
    assert modality_of(channel) == modality


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_file_escapes_as_an_exception(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = write_nifti(folder / "case-0.nii", IMAGE)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([100, 351, 5000, len(content)]))])
    terms = Terms(two_classes(), (1, 2), ("mr",), memory_gb=0.01)
    facts = examine_case(Case("case-0", (path,), path, Role.LABELED), terms)
    findings = [finding for check in CASE_CHECKS for finding in check.findings(facts, terms)]
    assert facts.channels or any(finding.severity is Severity.PROBLEM for finding in findings)
