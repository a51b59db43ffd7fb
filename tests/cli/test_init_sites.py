"""Site files from a CSV: one for each site, none of which sees another's cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.init_sites import write_site_files
from client.site_config import inventory, load_site_folder
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError
from tests.conftest import tiny_plan, write_blobs

ROWS = ["case-0,alpha,train", "case-1,alpha,train", "case-2,alpha,val", "case-3,beta,train", "case-4,beta,val"]


def _data(folder: Path, rows: list[str] | None = None, header: str = "case,site,split") -> tuple[Path, Path, Path]:
    write_blobs(folder, 6)
    table = folder / "sites.csv"
    table.write_text("\n".join([header, *(ROWS if rows is None else rows)]) + "\n")
    return folder / "images", folder / "labels", table


def _write(
    folder: Path, labeled: str = "1", rows: list[str] | None = None, header: str = "case,site,split"
) -> list[Path]:
    return write_site_files(
        *_data(folder, rows, header), folder / "sites", labeled, folder / "storage", ["lite-medsam"]
    )


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


def test_the_number_of_labeled_cases_may_differ_by_site(tmp_path: Path) -> None:
    _write(tmp_path, "2,0")
    alpha, beta = load_site_folder(tmp_path / "sites")
    assert alpha.data.labeled == ("case-0", "case-1")
    assert beta.data.labeled == ()


@pytest.mark.parametrize(
    ("labeled", "says"),
    [
        ("1,1,1", "expected is one number, or 2, for alpha, beta"),
        ("x", "expected is one number"),
        ("9", "only 2 train"),
    ],
)
def test_numbers_that_do_not_fit_stop(tmp_path: Path, labeled: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _write(tmp_path, labeled)


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        (ROWS, "case,site", "case, site, split"),
        ([], "case,site,split", "rows are expected"),
        ([*ROWS, "case-5,beta,test"], "case,site,split", "line 7: split = 'test'; accepted: train, val"),
        ([*ROWS, "case-0,beta,val"], "case,site,split", "case-0 is listed twice"),
    ],
)
def test_a_table_that_is_wrong_stops_with_its_line(tmp_path: Path, rows: list[str], header: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _write(tmp_path, rows=rows, header=header)


def test_missing_folders_stop(tmp_path: Path) -> None:
    images, labels, table = _data(tmp_path)
    with pytest.raises(ConfigError, match=r"--images .*there is no such folder"):
        write_site_files(tmp_path / "no", labels, table, tmp_path / "sites", "1", tmp_path / "storage", [])
    with pytest.raises(ConfigError, match=r"--table .*cannot be read"):
        write_site_files(images, labels, tmp_path / "no.csv", tmp_path / "sites", "1", tmp_path / "storage", [])


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
