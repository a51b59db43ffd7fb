"""Which scans a site has and what each may be used for."""

from __future__ import annotations

from pathlib import Path

import pytest

from semisam_core.data.cases import Inventory, Role, find_cases
from semisam_core.errors import ConfigError


def _touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def _site(tmp_path: Path) -> tuple[Path, Path]:
    images = _touch(tmp_path / "images", "a.nii.gz", "b.nii.gz", "c.nii", ".hidden.nii.gz", "notes.txt")
    return images, _touch(tmp_path / "labels", "a.nii.gz", "b.nii.gz")


def _ids(found: Inventory, role: Role) -> list[str]:
    return [case.id for case in found.of(role)]


def test_images_and_labels_are_paired_by_name_and_the_rest_is_unlabeled(tmp_path: Path) -> None:
    found = find_cases(*_site(tmp_path), 1, None, ())
    assert _ids(found, Role.LABELED) == ["a", "b"]
    assert _ids(found, Role.UNLABELED) == ["c"]


def test_an_unlabeled_case_carries_no_path_to_its_label(tmp_path: Path) -> None:
    found = find_cases(*_site(tmp_path), 1, ["a"], ())
    (b, c) = found.of(Role.UNLABELED)
    assert (b.id, b.label, c.id, c.label) == ("b", None, "c", None)


def test_validation_cases_are_never_trained_on(tmp_path: Path) -> None:
    found = find_cases(*_site(tmp_path), 1, None, ["a"])
    assert _ids(found, Role.VALIDATION) == ["a"]
    assert _ids(found, Role.LABELED) == ["b"]


def test_excluded_cases_do_not_exist(tmp_path: Path) -> None:
    found = find_cases(*_site(tmp_path), 1, None, (), ["b", "c"])
    assert [case.id for case in found.cases] == ["a"]


def test_a_missing_folder_stops_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: the images folder does not exist"):
        find_cases(tmp_path / "nowhere", None, 1, None, ())
    images, _ = _site(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere: the labels folder does not exist"):
        find_cases(images, tmp_path / "nowhere", 1, None, ())


def test_an_empty_folder_stops(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no NIfTI file"):
        find_cases(_touch(tmp_path / "images", "notes.txt"), None, 1, None, ())


@pytest.mark.parametrize("listed", ["labeled", "validation"])
def test_a_listed_case_without_a_label_is_quarantined(tmp_path: Path, listed: str) -> None:
    images, labels = _site(tmp_path)
    lists = {"labeled": ["a"], "validation": []}
    lists[listed] = [*lists[listed], "c"]
    found = find_cases(images, labels, 1, lists["labeled"], lists["validation"])
    assert [case.id for case in found.quarantined] == ["c"]
    assert f"listed as {listed}" in found.quarantined[0].reason


def test_a_label_without_an_image_is_quarantined(tmp_path: Path) -> None:
    images, labels = _site(tmp_path)
    _touch(labels, "z.nii.gz")
    found = find_cases(images, labels, 1, None, ())
    assert [(case.id, "without an image" in case.reason) for case in found.quarantined] == [("z", True)]
    assert len(found.cases) == 3


def test_lists_that_name_unknown_cases_stop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.validation names cases that are not there: y, z"):
        find_cases(*_site(tmp_path), 1, None, ["z", "a", "y"])


def test_lists_that_contradict_each_other_stop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.labeled and data.validation both name a"):
        find_cases(*_site(tmp_path), 1, ["a"], ["a"])


def test_one_case_in_two_files_stops(tmp_path: Path) -> None:
    images = _touch(tmp_path / "images", "a.nii", "a.nii.gz")
    with pytest.raises(ConfigError, match="same case twice"):
        find_cases(images, None, 1, None, ())


def test_channels_are_grouped_and_incomplete_cases_quarantined(tmp_path: Path) -> None:
    images = _touch(tmp_path / "images", "a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii.gz", "c.nii.gz")
    found = find_cases(images, None, 2, None, ())
    assert [[path.name for path in case.images] for case in found.cases] == [["a_0000.nii.gz", "a_0001.nii.gz"]]
    assert sorted(case.id for case in found.quarantined) == ["b", "c"]
