"""`semisam review`: the page as a real process, and the other commands from pseudo-label to agreement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from cli.main import app
from client.progress import ProgressLog
from client.reviews import ReviewStore
from client.scans import SiteScans
from client.site_config import load_site_config
from semisam_core.data.cases import Role
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
Options = tuple[str, ...]


@pytest.fixture
def options(make_site: MakeSite, tmp_path: Path) -> Options:
    """A site whose run `run` has pseudo-labels of two scans, written without training."""
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam]")
    site = make_site(cases=4, generalists={"lite-medsam": {"weights": "packaged"}})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    _write_pseudo_labels(site, plan)
    return ("--site", str(site), "--plan", str(tmp_path / "plan.yaml"))


def _write_pseudo_labels(site: Path, plan: Plan) -> None:
    config = load_site_config(site)
    folder = config.storage.folder / "runs" / "run"
    folder.mkdir(parents=True)
    scans = SiteScans(config, plan, ProgressLog(folder / "progress.jsonl", 1), folder)
    for k, (_, key, load) in enumerate(scans.keyed_pair_loaders(Role.UNLABELED)):
        pair = load()
        assert pair is not None
        target = (pair.scan.image[:1] > 1).float() * (0.9 - 0.2 * k)
        uncertainty = torch.full_like(target, 0.1 + k)
        label = PseudoLabel(target, uncertainty, torch.tensor([True]), (None,), target)
        PseudoLabelStore(folder / "pseudo_labels").save(str(key), label, 7)


def _call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["review", *map(str, arguments)])
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def test_the_page_runs_as_a_process_of_its_own_and_ends_with_the_work(options: Options) -> None:
    process, url = _opened(options)
    origin = url.rsplit("/", 2)[0]
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert b"Review of pseudo-labels" in answer.read()
    with urllib.request.urlopen(f"{url}worklist", timeout=30) as answer:
        assert [each["case"] for each in json.load(answer)["scans"]] == ["case-3", "case-1"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{origin}/worklist", timeout=30)
    headers = {"Origin": origin, "Content-Type": "application/json"}
    said = json.dumps({"ratings": {"blob": 1}, "minutes": 0.5}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}scans/0/review", said, headers), timeout=60) as answer:
        assert json.load(answer) == {"decision": "accepted"}
    urllib.request.urlopen(urllib.request.Request(f"{url}end", b"{}", headers), timeout=30).close()
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "Ended." in out
    (record,) = ReviewStore(load_site_config(Path(options[1])).storage.folder).records()
    assert (record.case, record.round, record.rater) == ("case-3", 7, "r1")


def test_ctrl_c_ends_the_page(options: Options) -> None:
    process, _ = _opened(options)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "Interrupted. What was kept is kept.")


def _opened(options: Options) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "cli.main", "review", "open", "--rater", "r1", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    url = next((line.strip() for line in process.stdout if line.startswith("http://127.0.0.1:")), "")
    assert url, process.communicate()
    return process, url


def test_the_most_doubtful_scan_is_listed_first(options: Options) -> None:
    code, output, _ = _call("list", "--rater", "r1", "--json", *options)
    listed = json.loads(output)
    assert code == 0
    assert [each["case"] for each in listed] == ["case-3", "case-1"]
    assert listed[0]["round"] == 7
    assert listed[0]["classes"][0]["disagreement"] == pytest.approx(1 - np.exp(-1.1), abs=1e-3)
    code, output, _ = _call("list", "--rater", "r1", *options)
    assert code == 0
    assert output.index("case-3") < output.index("case-1")


def test_a_mask_is_handed_over_corrected_taken_back_and_read_by_a_second_rater(
    options: Options, tmp_path: Path
) -> None:
    out = tmp_path / "to-correct"
    code, output, _ = _call("hand-over", "case-1", "-o", out, "--rater", "r1", *options)
    assert code == 0
    assert str(out / "mask.nii.gz") in output.replace(" ", "")
    taken = ("case-1", out / "mask.nii.gz", "--rating", "2", "--minutes", "6", *options)
    code, _, errors = _call("take", *taken, "--rater", "r1")
    assert (code, "nothing was corrected" in errors) == (2, True)
    image = nib.load(out / "mask.nii.gz")
    drawn = np.asarray(image.dataobj).copy()
    drawn[:3, :3, :3] = 1
    nib.save(nib.Nifti1Image(drawn * 9, image.affine), out / "bad.nii.gz")
    code, _, errors = _call("take", "case-1", out / "bad.nii.gz", *taken[2:], "--rater", "r1")
    assert (code, "the plan's classes accept [0, 1]" in errors) == (2, True)
    nib.save(nib.Nifti1Image(drawn, image.affine), out / "mask.nii.gz")
    code, output, _ = _call("take", *taken, "--rater", "r1")
    assert (code, output) == (0, "case-1: corrected. It is trained on from the next round on.")
    drawn[:3, :3, :3] = 0
    drawn[-3:, -3:, -3:] = 1
    nib.save(nib.Nifti1Image(drawn, image.affine), out / "mask.nii.gz")
    code, output, _ = _call("take", *taken, "--rater", "r2", "--second")
    assert code == 0
    code, output, _ = _call("agreement", "r1", "r2", "-o", tmp_path / "pictures", *options)
    assert code == 0
    assert output.startswith("blob: 1 rated by both, kappa none, weighted kappa none, Dice of 1 0.")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["ratings.png", "ratings.svg"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--rater", "Jane Doe"), "a pseudonym is expected"),
        (("--rater", "r1", "--run", "../x"), "no run of this name"),
        (("--rater", "r1", "--site", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_mistakes_end_with_a_sentence(options: Options, changed: tuple[str, ...], says: str) -> None:
    code, _, errors = _call("list", *options, *changed)
    assert code == 2
    assert says in errors
    assert "Traceback" not in errors


def test_ratings_are_numbers(options: Options, tmp_path: Path) -> None:
    for said in ("good", "blob=x", ""):
        code, _, errors = _call(
            "take", "case-1", tmp_path / "m.nii.gz", "--rating", said, "--minutes", "1", "--rater", "r1", *options
        )
        assert code == 2, said
        assert errors
