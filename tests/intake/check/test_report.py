"""The page stands alone, escapes every name, says that it stays at the site, and is the same for the same data."""

from __future__ import annotations

import base64
import io
import json
import re
import stat
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from cli.main import app
from client.site_config import load_site_config
from intake.check.charts import HEIGHT, WIDTH, histogram
from intake.check.examine import DataCheck
from intake.check.findings import Severity
from intake.check.pictures import SIDE, draw_planes, planes_through
from intake.check.report import render, write_report
from semisam_core.plan import load_plan
from semisam_core.reporting.overview import COLOURS
from tests.conftest import write_nifti
from tests.intake.check.sites import checked, clean_data, found, patient, site_yaml
from tests.intake.check.test_case_checks import two_classes
from tests.intake.check.test_measure import _geometry

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = '<img src=x onerror="alert(1)">&{{ 7 * 7 }}'
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
PLANS = Path(__file__).resolve().parents[3] / "site_configs"


class Page(HTMLParser):
    """Parse a page strictly: every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def check(tmp_path: Path) -> DataCheck:
    """Return the check of a site with a damaged case, an odd case, and a case with a hostile name."""
    data = clean_data(tmp_path, 4)
    (data / "images" / "case-0.nii.gz").write_bytes(b"no scan")
    write_nifti(data / "labels" / "case-1.nii.gz", patient(1)[1] * 0)
    for kind in ("images", "labels"):
        (data / kind / "case-2.nii.gz").rename(data / kind / f"{HOSTILE}.nii.gz")
    return checked(tmp_path, two_classes(), validation=["case-3"])


def test_the_page_is_well_formed_and_fetches_nothing(check: DataCheck) -> None:
    text = render(check)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    fetched = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert fetched
    assert all(re.match(r"data:image/png;base64,|#case-\d+$", value or "") for value in fetched)
    assert not re.search(r"url\(|@import|https?:|\bon\w+=\"", text.replace("&#34;", ""))
    assert all(image["alt"] for image in page.all("img"))
    assert all(drawing["aria-label"] for drawing in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids) == 4
    assert {link["href"] for link in page.all("a")} <= {f"#{each}" for each in ids}


def test_names_of_files_are_text_and_never_markup(check: DataCheck) -> None:
    page = Page(render(check))
    assert HOSTILE in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert any(HOSTILE in (image["alt"] or "") for image in page.all("img"))


def test_a_name_cannot_reorder_what_is_shown(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 1)
    for kind in ("images", "labels"):
        (data / kind / "case-0.nii.gz").rename(data / kind / "a\u202eb\x1b[2J.nii.gz")
    assert "a\\u202eb\\x1b[2J" in Page(render(checked(tmp_path, None))).text


def test_the_page_says_what_was_found_and_that_it_stays(check: DataCheck) -> None:
    text = " ".join(Page(render(check)).text.split())
    assert "This report stays at the site." in text
    assert "Problems to solve before this site joins a study: 1." in text
    assert "cannot be read" in text
    assert "its label is empty" in text
    assert "leak-patient: no manifest.json" in text
    assert text.index("cannot be read") < text.index("its label is empty"), "problems come first"
    assert "organ " in text


def test_the_page_is_the_owners_only_and_the_same_for_the_same_data(check: DataCheck, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(check, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == render(checked(tmp_path, two_classes(), validation=["case-3"]))


def test_a_picture_shows_the_patients_right_on_the_left_whatever_the_axes_of_the_file() -> None:
    affines = (np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, -1, 1]))
    drawn = []
    for affine in affines:
        volume, label = np.zeros((20, 20, 20), np.float32), np.zeros((20, 20, 20), np.uint8)
        right = slice(15, 20) if affine[0, 0] > 0 else slice(0, 5)
        volume[right] = 1.0
        label[8:12, 8:12, 8:12] = 2
        png = draw_planes(planes_through(volume, label, _geometry(volume.shape, affine)), (0.0, 1.0))
        drawn.append(matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3])
    axial = drawn[0][:, :SIDE]
    assert axial[SIDE // 2, 3].tolist() == [1, 1, 1]
    assert axial[SIDE // 2, -3].tolist() == [0, 0, 0]
    outline = np.abs(axial - to_rgb(COLOURS[1])).max(-1) < 0.01
    for places in np.nonzero(outline):
        assert (places.min(), places.max()) == pytest.approx((0.4 * SIDE, 0.6 * SIDE), abs=2)
    assert not outline[SIDE // 2, SIDE // 2], "an outline, not a filled area"
    assert np.array_equal(drawn[0], drawn[1])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60))
@example([sys.float_info.max, -9.9792015476736e291])  # a range above the largest float
@example([-sys.float_info.max, sys.float_info.max])
@example([0.0, 5e-324])
def test_a_histogram_counts_every_finite_value_once_and_stays_in_its_frame(values: list[float]) -> None:
    finite = [value for value in values if np.isfinite(value)]
    drawn = histogram("size", "mm", values)
    if drawn is None:
        assert not finite
        return
    assert sum(bar.count for bar in drawn.bars) == drawn.values == len(finite)
    for bar in drawn.bars:
        assert 0 <= bar.x <= bar.x + bar.width <= WIDTH + 0.2
        assert -0.1 <= bar.y <= bar.y + bar.height <= HEIGHT + 0.2


def _run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    return done.exit_code, done.stdout


def test_the_command_writes_the_report_to_storage_and_exits_with_1_for_a_problem(tmp_path: Path) -> None:
    data = clean_data(tmp_path, 2)
    site = site_yaml(tmp_path)
    code, said = _run(site)
    assert code == 0
    assert "0 problems, 0 warnings, 2 cases" in " ".join(said.split())
    Page((tmp_path / "storage" / "data-check.html").read_text())
    (data / "images" / "case-0.nii.gz").write_bytes(b"no scan")
    code, said = _run(site)
    assert code == 1
    assert "case-0" in said


def test_json_is_for_programs(tmp_path: Path) -> None:
    clean_data(tmp_path, 2)
    (tmp_path / "data" / "images" / "case-0.nii.gz").write_bytes(b"no scan")
    code, said = _run(site_yaml(tmp_path), "--json", "-o", tmp_path / "page.html")
    content = json.loads(said)
    assert code == 1
    assert content["counts"]["problems"] == 1
    assert {"check", "severity", "case", "sentence", "accepted"} == set(content["findings"][0])
    assert "window" in {each["check"] for each in content["not_done"]}
    assert Path(content["report"]) == tmp_path / "page.html"


def test_a_mistake_in_the_site_file_ends_with_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "check", str(site_yaml(tmp_path))])
    assert done.exit_code == 2
    assert "the images folder does not exist" in done.stderr


def test_a_real_ct_with_a_label_of_another_shape_is_a_problem(tmp_path: Path) -> None:
    if not (DATA / "ct" / "ct.nii.gz").exists():
        pytest.skip(f"the real CT is not at {DATA / 'ct'}")
    for kind, name in (("images", "ct"), ("labels", "organs")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        (tmp_path / "data" / kind / "ct.nii.gz").symlink_to(DATA / "ct" / f"{name}.nii.gz")
    result = checked(tmp_path, load_plan(PLANS / "abdominal-organs" / "plan.yaml"))
    assert "(122, 101, 30), the image has (122, 101, 112)" in found(result, "label-grid")[0][1]
    assert {finding.check for finding in result.of(Severity.PROBLEM)} == {"label-grid", "label-values"}
    assert not found(result, "modality")


def test_real_left_atrium_scans_are_clean_until_one_is_copied(tmp_path: Path, left_atrium: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for name in ("la_001", "la_002"):
            (tmp_path / "data" / kind / f"{name}.nii.gz").symlink_to(left_atrium / kind / f"{name}.nii.gz")
    plan = load_plan(PLANS / "left-atrium" / "plan.yaml")
    assert checked(tmp_path, plan, validation=["la_002"]).findings == ()
    scan = nib.load(left_atrium / "images" / "la_001.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj, np.int16), scan.affine), tmp_path / "data/images/la_900.nii.gz")
    (tmp_path / "data" / "labels" / "la_900.nii.gz").symlink_to(left_atrium / "labels" / "la_001.nii.gz")
    leaking = checked(tmp_path, plan, validation=["la_002", "la_900"])
    assert [case for case, _ in found(leaking, "leak-content")] == ["la_001"]
    assert load_site_config(tmp_path / "site.yaml").site == "north"
    assert base64.b64encode(leaking.cases[0].picture or b"").decode() in render(leaking)
