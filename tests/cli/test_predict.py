"""`semisam predict`: outputs and JSON for programs, and an exit status that says whether every scan was segmented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from semisam_core.plan import Plan
from tests.conftest import blob, tiny_plan, write_nifti
from tests.release.runs import write_run


@pytest.fixture
def run(tmp_path: Path, plan: Plan) -> Path:
    return write_run(tmp_path / "run", plan)


def _call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments), "--threads", "1", "--device", "cpu"])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_scans_are_segmented_and_programs_get_json(tmp_path: Path, run: Path) -> None:
    write_nifti(tmp_path / "scans" / "a.nii.gz", blob()[0])
    more = write_run(tmp_path / "more", tiny_plan("seed=1"))
    code, output, _ = _call(run, tmp_path / "scans", "-o", tmp_path / "out", "--also", more, "--uncertainty", "--json")
    (scan,) = json.loads(output)["scans"]
    assert code == 0
    assert (scan["name"], scan["state"]) == ("a", "done")
    assert list(scan["outputs"]) == ["a.nii.gz", "a_uncertainty.nii.gz", "a_disagreement.nii.gz"]
    assert all((tmp_path / "out" / name).is_file() for name in scan["outputs"])
    assert set(scan["volumes_ml"]) == {"blob"}
    assert len(scan["made_from"]["models"]) == 2
    code, output, _ = _call(run, tmp_path / "scans", "-o", tmp_path / "out", "--also", more, "--uncertainty")
    assert code == 0
    assert "kept" in output


def test_one_failed_scan_shows_in_the_exit_status_and_the_others_are_done(tmp_path: Path, run: Path) -> None:
    write_nifti(tmp_path / "scans" / "a.nii.gz", blob()[0])
    (tmp_path / "scans" / "b.nii.gz").write_bytes(b"torn")
    code, output, _ = _call(run, tmp_path / "scans", "-o", tmp_path / "out")
    assert code == 1
    assert "the gzip file is damaged" in " ".join(output.split())
    assert (tmp_path / "out" / "a.nii.gz").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing", "scans"), "no model is here"),
        (("run", "missing"), "there is no such file or folder"),
        (("run", "scans", "--format", "png"), "accepted are auto, nifti, dicom-seg, both"),
        (("run", "scans", "--device", "cuda:99"), "accepted are auto, cpu, cuda"),
        (("run", "scans", "--channel", "t1"), "name=pattern is expected"),
        (("run", "scans", "--channel", "t1=x"), "the model has the channels mr"),
    ],
)
def test_mistakes_end_with_one_sentence_before_any_work(
    tmp_path: Path, run: Path, arguments: tuple[str, ...], said: str
) -> None:
    write_nifti(tmp_path / "scans" / "a.nii.gz", blob()[0])
    places = [str(tmp_path / each) if each in ("run", "scans", "missing") else each for each in arguments]
    result = CliRunner().invoke(app, ["predict", *places, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
