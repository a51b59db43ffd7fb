"""Phantom hospitals: reproducible, written like a scanner's files, and not solvable by a threshold."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from scipy.ndimage import label as find_pieces

from semisam_core.data.cases import Case, Role
from semisam_core.data.phantom import (
    DEMO_SCANNERS,
    LABELED_ORGANS,
    ORGAN_NAMES,
    Scanner,
    make_phantom,
    write_phantom_site,
)
from semisam_core.data.scans import load_scan
from semisam_core.plan import load_plan
from tests.conftest import tiny_plan

SHIPPED = Path(__file__).resolve().parents[3] / "site_configs" / "phantom"
COARSE = Scanner((12.0, 10.0, 8.0), "PIL", gain=500.0, offset=20.0, gamma=1.2, bias=0.3, noise=0.05)
LIVER = 1 + ORGAN_NAMES.index("liver")
AXES = st.permutations(["RL", "AP", "SI"]).flatmap(lambda pairs: st.tuples(*(st.sampled_from(pair) for pair in pairs)))


def _patient(seed: int, number: int) -> int:
    """Return the seed of a hospital's patient."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _read(folder: Path, kind: str, name: str) -> Any:
    return nib.load(folder / kind / f"{name}.nii.gz")


def _as_ras(file: Any) -> NDArray[Any]:
    change = ornt_transform(io_orientation(file.affine), axcodes2ornt("RAS"))
    turned: NDArray[Any] = apply_orientation(np.asarray(file.dataobj), change)
    return turned


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_the_seed_selects_the_patient(seed: int) -> None:
    scan, organs = make_phantom(COARSE, seed)
    again, organs_again = make_phantom(COARSE, seed)
    assert np.array_equal(scan, again)
    assert np.array_equal(organs, organs_again)
    other, other_organs = make_phantom(COARSE, seed + 1)
    assert not np.array_equal(scan, other)
    assert not np.array_equal(organs, other_organs)


@pytest.mark.parametrize("name", sorted(DEMO_SCANNERS))
def test_a_patient_has_every_organ_on_a_grid_of_the_scanners_spacing(name: str) -> None:
    scanner = DEMO_SCANNERS[name]
    scan, organs = make_phantom(scanner, 1)
    assert scan.shape == organs.shape
    assert (scan.dtype, organs.dtype) == (np.float32, np.uint8)
    assert np.isfinite(scan).all()
    assert set(np.unique(organs)) == set(range(len(ORGAN_NAMES) + 1))
    extent = np.array(scan.shape) * scanner.spacing_mm
    assert np.allclose(extent, (206, 206, 128), atol=max(scanner.spacing_mm))


def test_the_liver_is_on_the_right_and_the_spine_is_posterior() -> None:
    centres = []
    for seed in range(5):
        _, organs = make_phantom(COARSE, seed)
        middle = (np.array(organs.shape) - 1) / 2
        centres.append([np.argwhere(organs == 1 + ORGAN_NAMES.index(n)).mean(0) - middle for n in ("liver", "spine")])
    (liver, spine) = np.mean(centres, axis=0)
    assert liver[0] > 0
    assert spine[1] < 0


@pytest.mark.parametrize("name", sorted(DEMO_SCANNERS))
def test_the_livers_signal_overlaps_other_organs(name: str) -> None:
    scan, organs = make_phantom(DEMO_SCANNERS[name], 0)
    low, high = np.percentile(scan[organs == LIVER], (5, 95))
    others = [scan[organs == place] for place in range(1, len(ORGAN_NAMES) + 1) if place != LIVER]
    ranges = [np.percentile(other, (5, 95)) for other in others]
    assert sum(bool(start < high and low < end) for start, end in ranges) >= 2


@pytest.mark.parametrize("name", sorted(DEMO_SCANNERS))
def test_no_intensity_window_segments_the_liver(name: str) -> None:
    scan, organs = make_phantom(DEMO_SCANNERS[name], 0)
    liver = organs == LIVER
    best = 0.0
    for low, high in combinations(np.percentile(scan, np.linspace(0, 100, 25)), 2):
        window = (scan >= low) & (scan <= high)
        best = max(best, 2 * float((window & liver).sum()) / float(window.sum() + liver.sum()))
    assert best < 0.8


def test_the_demo_hospitals_differ_in_axes_spacing_and_intensity() -> None:
    scanners = DEMO_SCANNERS.values()
    assert len(scanners) == 3
    assert any(scanner.axes != "RAS" for scanner in scanners)
    assert len({scanner.axes for scanner in scanners}) == 3
    assert len({scanner.spacing_mm for scanner in scanners}) == 3
    means = sorted(float(make_phantom(scanner, 0)[0].mean()) for scanner in scanners)
    assert all(one * 1.5 < next_one for one, next_one in pairwise(means))


def test_a_hospital_gets_one_image_and_one_label_per_patient(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_phantom_site(tmp_path, COARSE, 3, 7, "west", progress=lambda *done: calls.append(done))
    for kind in ("images", "labels"):
        names = sorted(path.name for path in (tmp_path / kind).iterdir())
        assert names == ["west-00.nii.gz", "west-01.nii.gz", "west-02.nii.gz"]
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_writing_a_hospital_is_reproducible_and_its_patients_differ(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_phantom_site(folder, COARSE, 2, 7, "west")
    scans = [np.asarray(_read(tmp_path / site, "images", f"west-0{k}").dataobj) for site in "ab" for k in (0, 1)]
    assert np.array_equal(scans[0], scans[2])
    assert np.array_equal(scans[1], scans[3])
    assert not np.array_equal(scans[0], scans[1])


@settings(deadline=None, max_examples=12)
@given(axes=AXES)
def test_files_follow_the_scanners_axes_and_hold_the_patients_voxels(
    tmp_path_factory: pytest.TempPathFactory, axes: tuple[str, str, str]
) -> None:
    folder = tmp_path_factory.mktemp("site")
    scanner = dataclasses.replace(COARSE, axes="".join(axes))
    write_phantom_site(folder, scanner, 1, 7, "west")
    image, label = (_read(folder, kind, "west-00") for kind in ("images", "labels"))
    assert nib.aff2axcodes(image.affine) == axes
    assert np.array_equal(image.affine, label.affine)
    assert image.shape == label.shape
    scan, organs = make_phantom(scanner, _patient(7, 0))
    assert np.array_equal(_as_ras(image), np.rint(scan))
    assert np.array_equal(_as_ras(label), organs == LIVER)


@pytest.mark.parametrize("name", sorted(DEMO_SCANNERS))
def test_files_are_nifti_in_millimetres_centred_on_the_isocentre(tmp_path: Path, name: str) -> None:
    scanner = DEMO_SCANNERS[name]
    write_phantom_site(tmp_path, scanner, 1, 0, name)
    for kind in ("images", "labels"):
        file = _read(tmp_path, kind, f"{name}-00")
        assert isinstance(file, nib.Nifti1Image)
        assert file.header.get_xyzt_units()[0] == "mm"
        turned = nib.as_closest_canonical(file)
        assert turned.header.get_zooms() == pytest.approx(scanner.spacing_mm)
        centre = file.affine @ [*((np.array(file.shape) - 1) / 2), 1]
        assert centre[:3] == pytest.approx((0, 0, 0), abs=1e-4)


def test_target_organs_are_numbered_in_the_given_order(tmp_path: Path) -> None:
    targets = ("spleen", "liver", "aorta")
    write_phantom_site(tmp_path, COARSE, 1, 7, "west", targets)
    label = _as_ras(_read(tmp_path, "labels", "west-00"))
    _, organs = make_phantom(COARSE, _patient(7, 0))
    for value, name in enumerate(targets, start=1):
        assert np.array_equal(label == value, organs == 1 + ORGAN_NAMES.index(name))
    assert set(np.unique(label)) == {0, 1, 2, 3}


def test_an_unknown_organ_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no organ is called \['heart'\]; accepted are {', '.join(ORGAN_NAMES)}"):
        write_phantom_site(tmp_path / "site", COARSE, 1, 7, "west", ("liver", "heart"))
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("name", sorted(DEMO_SCANNERS))
def test_files_load_like_any_scan(tmp_path: Path, name: str) -> None:
    write_phantom_site(tmp_path, DEMO_SCANNERS[name], 1, 0, name, ("liver", "spleen"))
    plan = tiny_plan(
        "task.classes=[{name: liver, value: 1}, {name: spleen, value: 2}]", "data.spacing_mm=[4.0, 4.0, 4.0]"
    )
    files = [tmp_path / kind / f"{name}-00.nii.gz" for kind in ("images", "labels")]
    scan = load_scan(Case(name, (files[0],), files[1], Role.LABELED), plan)
    assert scan.grid.spacing_mm == pytest.approx((4, 4, 4), abs=1e-4)
    assert scan.label is not None
    assert scan.label.unique().tolist() == [0, 1, 2]
    liver, spleen = (float((scan.label == k).nonzero()[:, 0].float().mean()) for k in (1, 2))
    assert liver > scan.label.shape[0] / 2 > spleen  # the first axis runs to the right, in every file


def test_the_organ_plan_has_a_small_organ_and_one_that_touches_the_liver() -> None:
    plan = load_plan(SHIPPED / "plan-organs.yaml")
    values = {target.name: target.value for target in plan.task.classes}
    assert set(values) == {"liver", "gallbladder", "right-kidney"}
    assert all(LABELED_ORGANS[value - 1] == name for name, value in values.items())
    volumes, contacts = [], []
    for name, scanner in DEMO_SCANNERS.items():
        for number in range(3):
            _, organs = make_phantom(scanner, _patient(sorted(DEMO_SCANNERS).index(name), number))
            masks = {organ: organs == 1 + ORGAN_NAMES.index(organ) for organ in values}
            volumes.append(masks["gallbladder"].sum() / masks["liver"].sum())
            contacts.append(bool((binary_dilation(masks["liver"]) & masks["right-kidney"]).any()))
    assert max(volumes) < 0.1
    assert sum(contacts) >= len(contacts) - 2


@pytest.mark.parametrize("plan", sorted(SHIPPED.glob("plan*.yaml")), ids=lambda path: path.stem)
def test_labels_fit_every_shipped_plan(tmp_path: Path, plan: Path) -> None:
    write_phantom_site(tmp_path, DEMO_SCANNERS["north"], 1, 0, "north", LABELED_ORGANS)
    files = [tmp_path / kind / "north-00.nii.gz" for kind in ("images", "labels")]
    scan = load_scan(Case("north-00", (files[0],), files[1], Role.LABELED), load_plan(plan))
    assert scan.label is not None
    assert scan.label.unique().tolist() == list(range(1 + len(load_plan(plan).task.classes)))


@pytest.mark.parametrize("plan", sorted(SHIPPED.glob("plan*.yaml")), ids=lambda path: path.stem)
def test_connected_organs_of_shipped_plans_are_one_component_in_every_patient(plan: Path) -> None:
    connected = [target.name for target in load_plan(plan).task.classes if target.connected]
    assert connected
    for scanner in DEMO_SCANNERS.values():
        for seed in range(4):
            _, organs = make_phantom(scanner, seed)
            pieces = [find_pieces(organs == 1 + ORGAN_NAMES.index(name), np.ones((3, 3, 3)))[1] for name in connected]
            assert pieces == [1] * len(connected)
