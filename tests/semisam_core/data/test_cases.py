"""Which scans a site has and what each may be used for."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch

from client.site_config import inventory, load_site_config
from semisam_core.data.cases import Inventory, Role, find_cases
from semisam_core.errors import ConfigError
from tests.conftest import blob, tiny_plan, write_site
from tests.semisam_core.data.files import load, write_pair, write_volume


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


def _pairs(found: Inventory) -> dict[str, tuple[str, str | None]]:
    return {case.id: (case.images[0].name, case.label.name if case.label else None) for case in found.cases}


def _find(folder: Path, images: list[str], labels: list[str], labeled: list[str] | None = None) -> Inventory:
    return find_cases(_touch(folder / "images", *images), _touch(folder / "labels", *labels), 1, labeled, ())


def _reasons(found: Inventory) -> dict[str, str]:
    return {each.id: each.reason for each in found.quarantined}


def test_nnunets_channel_number_is_dropped_in_a_study_of_one_channel(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a_0000.nii.gz", "b_0000.nii.gz", "c.nii.gz"], ["a.nii.gz", "c.nii.gz"])
    assert _pairs(found) == {
        "a": ("a_0000.nii.gz", "a.nii.gz"),
        "b": ("b_0000.nii.gz", None),
        "c": ("c.nii.gz", "c.nii.gz"),
    }
    assert not found.quarantined


def test_numbers_that_distinguish_cases_stay(tmp_path: Path) -> None:
    found = _find(tmp_path, ["case_0000.nii.gz", "case_0001.nii.gz"], ["case_0001.nii.gz"])
    assert sorted(_pairs(found)) == ["case_0000", "case_0001"]


@pytest.mark.parametrize("label", ["a_0000.nii.gz", "a_0000_seg.nii.gz"])
def test_a_number_that_the_label_has_too_stays(tmp_path: Path, label: str) -> None:
    assert _pairs(_find(tmp_path, ["a_0000.nii.gz"], [label])) == {"a_0000": ("a_0000.nii.gz", label)}


def test_a_number_by_which_the_site_names_the_case_stays(tmp_path: Path) -> None:
    found = find_cases(_touch(tmp_path / "images", "a_0000.nii.gz", "b.nii.gz"), None, 1, None, (), ["a_0000"])
    assert list(_pairs(found)) == ["b"]


def test_of_a_scan_with_and_without_a_number_the_second_is_left_out(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.nii.gz", "a_0000.nii.gz"], ["a.nii.gz"])
    assert _pairs(found) == {"a": ("a.nii.gz", "a.nii.gz")}
    assert _reasons(found) == {
        "a_0000": "a.nii.gz may be the same scan; remove one of them, or give this one another name"
    }


def test_labels_named_seg_belong_to_their_case(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.nii.gz", "b_0000.nii.gz"], ["a_seg.nii.gz", "b_seg.nii.gz"])
    assert _pairs(found) == {"a": ("a.nii.gz", "a_seg.nii.gz"), "b": ("b_0000.nii.gz", "b_seg.nii.gz")}


def test_labels_named_seg_belong_to_their_case_with_several_channels(tmp_path: Path) -> None:
    images = _touch(tmp_path / "images", "a_0000.nii.gz", "a_0001.nii.gz")
    (case,) = find_cases(images, _touch(tmp_path / "labels", "a_seg.nii.gz"), 2, None, ()).cases
    assert (case.id, case.label) == ("a", tmp_path / "labels" / "a_seg.nii.gz")


def test_of_two_labels_of_a_case_the_one_with_its_exact_name_is_used(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.nii.gz"], ["a.nii.gz", "a_seg.nii.gz"])
    assert _pairs(found) == {"a": ("a.nii.gz", "a.nii.gz")}
    assert _reasons(found) == {"a_seg": "case a already has the label a.nii.gz; remove one of them"}


def test_suffixes_in_capitals_are_suffixes(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.NII.GZ", "b.Nii"], ["a.nii.gz", "b.NII.gz"])
    assert _pairs(found) == {"a": ("a.NII.GZ", "a.nii.gz"), "b": ("b.Nii", "b.NII.gz")}


def test_scans_with_suffixes_in_capitals_are_read(tmp_path: Path) -> None:
    plain = load(write_pair(tmp_path))
    for kind in ("images", "labels"):
        (tmp_path / kind / "a.nii.gz").rename(tmp_path / kind / "a.NII.GZ")
    assert torch.equal(load(tmp_path).image, plain.image)


def test_macos_files_and_backup_copies_are_ignored(tmp_path: Path) -> None:
    names = ["a.nii.gz", "._a.nii.gz", ".DS_Store", "a.nii.gz.bak", "a.nii.gz~"]
    found = _find(tmp_path, names, names)
    assert list(_pairs(found)) == ["a"]
    assert not found.quarantined


def test_a_backup_copy_with_a_scans_suffix_is_left_out(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.nii.gz", "a.bak.nii.gz"], ["a.nii.gz"])
    assert list(_pairs(found)) == ["a"]
    assert "backup copy" in _reasons(found)["a.bak"]


def test_a_label_among_the_images_is_left_out(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.nii.gz", "a_seg.nii.gz"], [])
    assert list(_pairs(found)) == ["a"]
    assert _reasons(found) == {"a_seg": "looks like the label of a.nii.gz; move it to the labels folder"}


NFC, NFD = unicodedata.normalize("NFC", "Müller-é"), unicodedata.normalize("NFD", "Müller-é")


@pytest.mark.parametrize("image", [NFC, NFD])
@pytest.mark.parametrize("label", [NFC, NFD])
@pytest.mark.parametrize("listed", [NFC, NFD])
def test_names_match_however_their_unicode_is_composed(tmp_path: Path, image: str, label: str, listed: str) -> None:
    write_volume(tmp_path / "data" / "alpha" / "images" / f"{image}.nii.gz", blob()[0])
    write_volume(tmp_path / "data" / "alpha" / "labels" / f"{label}.nii.gz", blob()[1])
    config = load_site_config(write_site(tmp_path, "alpha", data={"labeled": [listed], "validation": []}))
    (case,) = inventory(config, tiny_plan()).cases
    assert (case.id, case.role) == (NFC, Role.LABELED)
    assert config.data.labeled == (NFC,)


def test_two_files_that_differ_in_their_unicode_only_are_one_case_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are the same case twice; remove one") as raised:
        _find(tmp_path, [f"{NFC}.nii.gz", f"{NFD}.nii.gz"], [])
    assert all(ascii(f"{name}.nii.gz") in str(raised.value) for name in (NFC, NFD))


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("A.nii.gz", "; A.nii.gz looks like it: name it a.nii.gz"),
        ("a_mask.nii", "; a_mask.nii looks like it: name it a.nii.gz"),
        ("a-label.nii.gz", "; a-label.nii.gz looks like it: name it a.nii.gz"),
        ("a.nii.gz.bak", "; a.nii.gz.bak looks like it: name it a.nii.gz"),
        ("a (1).nii.gz", "; a (1).nii.gz looks like it: name it a.nii.gz"),
        ("a.nrrd", "; a.nrrd looks like it: export it as a.nii.gz"),
        ("b.nii.gz", ""),
    ],
)
def test_the_file_that_looks_like_a_missing_label_is_named_with_what_to_call_it(
    tmp_path: Path, label: str, hint: str
) -> None:
    found = _find(tmp_path, ["a.nii.gz"], [label], labeled=["a"])
    assert _reasons(found)["a"] == f"listed as labeled, but the labels folder has no file of this name{hint}"


def test_the_label_of_another_case_is_not_suggested(tmp_path: Path) -> None:
    found = _find(tmp_path, ["a.nii.gz", "A.nii.gz"], ["A.nii.gz"], labeled=["a", "A"])
    assert _reasons(found) == {"a": "listed as labeled, but the labels folder has no file of this name"}


def test_the_image_that_an_orphaned_label_looks_like_is_named(tmp_path: Path) -> None:
    found = _find(tmp_path, ["Case-7_0000.nii.gz"], ["case-7.nii.gz"])
    assert _reasons(found) == {
        "case-7": "a label without an image: no image file has this name; Case-7_0000.nii.gz looks like it: name the "
        "label Case-7.nii.gz"
    }


def test_numbers_never_make_two_cases_alike(tmp_path: Path) -> None:
    found = _find(tmp_path, ["case_0001.nii.gz", "case-2.nii.gz"], ["case_0002.nii.gz", "case-1.nii.gz"])
    assert all("looks like" not in reason for reason in _reasons(found).values())
    assert len(_reasons(found)) == 2


def test_an_unknown_name_in_a_list_comes_with_the_case_that_it_looks_like(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not there: A.nii.gz \(is it a\?\), z\."):
        find_cases(*_site(tmp_path), 1, ["A.nii.gz", "z"], ())


def test_images_and_labels_in_one_folder_are_refused(tmp_path: Path) -> None:
    images = _touch(tmp_path / "images", "a.nii.gz")
    with pytest.raises(ConfigError, match="one folder; labels need a folder of their own"):
        find_cases(images, images, 1, None, ())


@pytest.mark.parametrize("folder", ["x" * 300, "loop"])
def test_a_folder_that_cannot_be_read_stops_with_its_name(tmp_path: Path, folder: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=f"{folder}: the images folder cannot be read"):
        find_cases(tmp_path / folder, None, 1, None, ())
