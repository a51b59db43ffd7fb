"""`semisam import` leaves a folder that the other commands take as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from cli.main import app
from client.site_config import inventory, load_site_config
from deployment.site_template import write_for_import
from tests.conftest import tiny_plan
from tests.intake.dicoms import ramp, write_seg, write_series

KEY = 32 * "01"  # of pseudonyms; with it the one patient is for training


def _import(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_an_import_gets_the_settings_of_its_site_once(tmp_path: Path) -> None:
    out = tmp_path / "North Hospital"
    files = write_series(tmp_path / "export")
    write_seg(tmp_path / "export" / "seg", files, np.ones((*ramp().shape, 1), np.uint8), ["Blob"])
    (tmp_path / "key").write_text(KEY)
    arguments = (tmp_path / "export", "-o", out, "--classes", "blob=1", "--key", tmp_path / "key")
    _import(*arguments, "--dry-run")
    assert not out.exists()

    assert f"The site's settings: {out / 'site.yaml'}." in _import(*arguments)
    site = load_site_config(out / "site.yaml")
    found = inventory(site, tiny_plan())
    assert (site.site, [case.label for case in found.cases]) == (
        "north-hospital",
        [out / "labels" / f"{found.cases[0].id}.nii.gz"],
    )
    assert site.data.split is not None
    assert site.data.split.validation_share == 0.2
    assert site.storage.folder == out / "storage"

    (out / "site.yaml").write_text("version: 1  # edited\n", encoding="utf-8")
    assert "which was there and is left as it is" in _import(*arguments)
    assert (out / "site.yaml").read_text(encoding="utf-8") == "version: 1  # edited\n"


def test_a_site_without_labels_has_no_split_and_any_folder_gives_a_name(tmp_path: Path) -> None:
    for folder, name in (("ÄÖ", "site"), ("2024", "2024"), ("a_b C", "a-b-c")):
        (tmp_path / folder / "images").mkdir(parents=True)
        path, written = write_for_import(tmp_path / folder, labels=False)
        site = load_site_config(path)
        assert (written, site.site, site.data.labels, site.data.split) == (True, name, None, None)
