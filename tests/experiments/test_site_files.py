"""Site files from a CSV: one per site, none of which sees another's cases, and every name reads back as it was."""

from __future__ import annotations

import csv
import tempfile
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from client.site_config import SiteConfig, inventory, load_site_config, load_site_folder
from experiments.site_files import write_site_files
from semisam_core.configuration import flow_yaml
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from tests.conftest import blob, tiny_plan, write_blobs, write_nifti

ROWS = ["case-0,alpha,train", "case-1,alpha,train", "case-2,alpha,val", "case-3,beta,train", "case-4,beta,val"]
AWKWARD = [
    "0007",
    "2.10",
    "12:32",
    "1e3",
    "yes",
    "null",
    "a#b",
    "a #b",
    "a: b",
    "[x]",
    "x,y",
    "{x}",
    "'",
    '"',
    "-",
    "~",
]


def _data(folder: Path, rows: list[str] | None = None, header: str = "case,site,split") -> tuple[Path, Path, Path]:
    write_blobs(folder, 6)
    table = folder / "sites.csv"
    table.write_text("\n".join([header, *(ROWS if rows is None else rows)]) + "\n")
    return folder / "images", folder / "labels", table


def _write(folder: Path, labeled: str = "1", rows: list[str] | None = None) -> list[Path]:
    return write_site_files(*_data(folder, rows), folder / "sites", labeled, folder / "storage", ["lite-medsam"])


def test_each_site_gets_its_own_cases_only(tmp_path: Path) -> None:
    assert [path.name for path in _write(tmp_path)] == ["alpha.yaml", "beta.yaml"]
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam]")
    alpha, beta = (inventory(config, plan) for config in load_site_folder(tmp_path / "sites"))
    assert {case.id: case.role for case in alpha.cases} == {
        "case-0": Role.LABELED,
        "case-1": Role.UNLABELED,
        "case-2": Role.VALIDATION,
    }
    assert {case.id: case.role for case in beta.cases} == {"case-3": Role.LABELED, "case-4": Role.VALIDATION}


def test_images_of_several_channels_are_one_case(tmp_path: Path) -> None:
    for case in ("x", "y", "other"):
        image, label = blob()
        write_nifti(tmp_path / "labels" / f"{case}.nii.gz", label)
        for channel in range(2):
            write_nifti(tmp_path / "images" / f"{case}_{channel:04d}.nii.gz", image)
    table = tmp_path / "sites.csv"
    table.write_text("case,site,split\nx,alpha,train\ny,beta,train\n")
    write_site_files(tmp_path / "images", tmp_path / "labels", table, tmp_path / "sites", "1", tmp_path / "storage", [])
    plan = tiny_plan("task.channels=[t1, t2]", "pseudo_labels=null")
    found = [inventory(config, plan) for config in load_site_folder(tmp_path / "sites")]
    assert [[case.id for case in each.cases] for each in found] == [["x"], ["y"]]
    assert all(not each.quarantined for each in found)


def test_the_number_of_labeled_cases_may_differ_by_site(tmp_path: Path) -> None:
    _write(tmp_path, "2,0")
    alpha, beta = load_site_folder(tmp_path / "sites")
    assert alpha.data.labeled == ("case-0", "case-1")
    assert beta.data.labeled == ()


def test_the_comments_of_the_template_are_kept(tmp_path: Path) -> None:
    text = _write(tmp_path)[0].read_text()
    assert "# Cases whose labels are for scoring only.\n  validation: [case-2]" in text
    assert "# Limits on what may leave. A plan cannot loosen them." in text


def _round_trip(folder: Path, cases: list[str], images: str, site: str) -> SiteConfig:
    """Write the table as a spreadsheet would, the site file from it, and read that."""
    for name in (images, "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / "sites.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case", "site", "split"), *((case, site, "train") for case in cases)])
    (path,) = write_site_files(
        folder / images,
        folder / "labels",
        folder / "sites.csv",
        folder / "sites",
        str(len(cases)),
        folder / f"storage of {images}",
        ["lite-medsam"],
    )
    return load_site_config(path)


@pytest.mark.parametrize("folder", ["plain", "a #b", "a: b", "- c", "50%", "x, y", "{site}", "null", "# d"])
def test_awkward_names_of_cases_and_folders_read_back_as_they_were(folder: str, tmp_path: Path) -> None:
    config = _round_trip(tmp_path, AWKWARD, folder, "alpha")
    assert config.data.labeled == tuple(sorted(AWKWARD))
    assert config.data.images == tmp_path / folder
    assert config.storage.folder == tmp_path / f"storage of {folder}" / "alpha"


@pytest.mark.parametrize("site", ["null", "yes", "0007", "1e3", "0x1f", "0b1", "on", "2020-01-01"])
def test_a_site_may_be_called_what_yaml_reads_as_a_number_or_a_truth_value(site: str, tmp_path: Path) -> None:
    assert _round_trip(tmp_path, ["case"], "images", site).site == site


@pytest.mark.parametrize("name", ["a\nb", "a\r\nb", "a\x85b", "\x85", "a\u2028b", " a ", "\ufeffa"])
def test_a_value_is_one_line_of_yaml_whatever_it_contains(name: str) -> None:
    text = flow_yaml(name)
    assert len(text.splitlines()) == 1
    assert yaml.safe_load(f"single: {text}\nlist: [{text}, x]") == {"single": name, "list": [name, "x"]}


# What a file system takes as a name and a table can hold; the table is read in composed Unicode, without outer spaces.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0\r", max_codepoint=0x2FFF), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(cases=st.lists(NAMES, min_size=1, max_size=4), folder=NAMES)
def test_any_name_reads_back_as_it_was(cases: list[str], folder: str) -> None:
    cases = sorted({name for case in cases if (name := unicodedata.normalize("NFC", case).strip())})
    folder = f"i{folder}"  # neither . nor ..
    if not cases:
        return
    with tempfile.TemporaryDirectory() as place:
        config = _round_trip(Path(place).resolve(), cases, folder, "alpha")
        assert config.data.labeled == tuple(cases)
        assert config.data.images == Path(place).resolve() / folder


@pytest.mark.parametrize("site", ["Charite", "site a", "../up", "a/b", "", "-a", "a" * 64, "köln", "."])
def test_a_site_name_that_no_command_would_accept_is_refused_before_anything_is_written(
    site: str, tmp_path: Path
) -> None:
    rows = ["case-0,alpha,train", f"case-1,{site},train"]
    says = "no value for site" if not site else r"site = '.*': a site's name has lowercase letters, digits and dashes"
    with pytest.raises(ConfigError, match=rf"--table .*{says}"):
        _write(tmp_path, rows=rows)
    assert not (tmp_path / "sites").exists()


@pytest.mark.parametrize(
    ("labeled", "says"),
    [
        ("1,1,1", "expected one number, or 2: one each for alpha, beta"),
        ("x", "expected one number"),
        ("²", "expected one number"),
        ("2", "beta has only 1 train cases"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, labeled: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _write(tmp_path, labeled)
    assert not (tmp_path / "sites").exists()


def test_missing_folders_and_unknown_generalists_are_refused(tmp_path: Path) -> None:
    images, labels, table = _data(tmp_path)
    with pytest.raises(ConfigError, match=r"--images .*there is no such folder"):
        write_site_files(tmp_path / "no", labels, table, tmp_path / "sites", "1", tmp_path / "storage", [])
    with pytest.raises(ConfigError, match=r"--table .*cannot be read"):
        write_site_files(images, labels, tmp_path / "no.csv", tmp_path / "sites", "1", tmp_path / "storage", [])
    with pytest.raises(ConfigError, match="no-such-model"):
        write_site_files(images, labels, table, tmp_path / "sites", "1", tmp_path / "storage", ["no-such-model"])
    assert not (tmp_path / "sites").exists()


def test_an_image_whose_name_is_not_utf_8_is_named(tmp_path: Path) -> None:
    images, labels, table = _data(tmp_path)
    (images / "case-0.nii.gz").rename(Path(f"{images}/M\udcfcller.nii.gz"))
    with pytest.raises(ConfigError, match=r"the file name 'M\\udcfcller.nii.gz' is not UTF-8"):
        write_site_files(images, labels, table, tmp_path / "sites", "1", tmp_path / "storage", [])


def test_the_real_table_gives_four_sites(left_atrium: Path, tmp_path: Path) -> None:
    table = left_atrium / "sites.csv"
    folders = (left_atrium / "images", left_atrium / "labels")
    write_site_files(*folders, table, tmp_path, "1,1,0,0", tmp_path / "storage", ["lite-medsam"])
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam]")
    counts = []
    for config in load_site_folder(tmp_path):
        found = inventory(config, plan)
        counts.append([len(found.of(role)) for role in (Role.LABELED, Role.UNLABELED, Role.VALIDATION)])
    assert counts == [[1, 9, 2], [1, 9, 2], [0, 10, 2], [0, 10, 2]]
