"""The viewer's page: the volumes that it holds, where they lie, which scripts may run. In a browser: test_browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from reports.site import viewer
from reports.site.report import REPORT, VIEWER, write_site_report
from reports.site.viewer import Layer, layer, viewer_page
from semisam_core.data.geometry import Geometry
from tests.reports.conftest import Ran
from tests.reports.pages import name_of, parsed

GRID = Geometry((24, 24, 16), torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64)))


def _volume(packed: Layer | dict[str, Any]) -> nib.Nifti1Image:
    content = packed.nifti if isinstance(packed, Layer) else packed["nifti"]
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content)))


def _held(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="cases">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(ran: Ran) -> Path:
    return write_site_report(ran.site("alpha"), ran.plan, cases=["case-1", "case-2"], viewer=True).with_name(VIEWER)


def test_it_holds_what_there_is_of_each_scan_on_one_grid(page: Path) -> None:
    unlabeled, scored = _held(page.read_text())
    assert (unlabeled["name"], scored["name"]) == ("case-1 (unlabeled)", "case-2 (validation)")
    assert [each["name"] for each in unlabeled["layers"]] == ["scan", "pseudo-label", "prediction", "uncertainty"]
    assert [each["name"] for each in scored["layers"]] == ["scan", "label", "prediction"]
    for case in (unlabeled, scored):
        volumes = [_volume(each) for each in case["layers"]]
        assert len({(each.shape, each.affine.tobytes()) for each in volumes}) == 1
        assert [each["shown"] for each in case["layers"]].count(True) == 2  # the scan and the prediction
    label = np.asarray(_volume(scored["layers"][1]).dataobj)
    assert set(np.unique(label)) == {0, 1}
    inside, outside = (np.asarray(_volume(scored["layers"][0]).dataobj)[label == each].mean() for each in (1, 0))
    assert inside > outside + 50  # the label lies on the bright blob


def test_only_its_owner_can_read_it_and_the_report_names_it(page: Path) -> None:
    assert page.stat().st_mode & 0o077 == 0
    assert f'href="{VIEWER}"' in page.with_name(REPORT).read_text()
    assert "This page stays at the site." in page.read_text()


def test_a_report_without_it_names_no_viewer(ran: Ran) -> None:
    assert VIEWER not in write_site_report(ran.site("beta"), ran.plan).read_text()


def test_only_its_own_two_scripts_may_run_and_nothing_is_fetched(page: Path) -> None:
    content = page.read_text()
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', content)
    assert policy is not None
    allowed = re.findall(r"'sha256-([^']+)'", policy[1])
    scripts = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    assert allowed == [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    assert len(allowed) == 2
    assert policy[1].startswith("default-src 'none'")
    assert "http" not in policy[1]
    assert "unsafe-eval" not in policy[1]


def test_niivue_is_the_file_of_its_package() -> None:
    file = Path(viewer.__file__).parent / "niivue.umd.js"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found == "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"  # @niivue/niivue 0.69.0


def test_a_large_volume_is_thinned_and_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.random.default_rng(0).integers(0, 255, GRID.shape, dtype=np.uint8)
    monkeypatch.setattr(viewer, "MOST_VOXELS", whole.size // 8)
    packed = layer("scan", "scan", whole, GRID, True)
    thinned = _volume(packed)
    assert packed.stride == 2
    np.testing.assert_array_equal(np.asarray(thinned.dataobj), whole[::2, ::2, ::2])
    voxel = np.array([3, 4, 5, 1])
    np.testing.assert_allclose(thinned.affine @ voxel, GRID.affine.numpy() @ (voxel * [2, 2, 2, 1]))
    assert "one voxel in 2 along each axis" in viewer_page("s", "r", ["blob"], [("case", [packed])])


def test_names_cannot_break_out_of_the_page() -> None:
    name = "</script><script>alert(1)</script>"
    small = layer("scan", "scan", np.zeros((2, 2, 2), np.uint8), GRID, True)
    content = viewer_page(name, name, [name], [(name, [small])])
    assert len([each for each in parsed(content).iter() if name_of(each) == "script"]) == 4
    assert _held(content)[0]["name"] == name
