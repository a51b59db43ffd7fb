"""A site's own report: pictures of what is stored, the worst first, and where it may be read."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as png
from numpy.typing import NDArray
from typer.testing import CliRunner

from cli.main import app
from client.site_config import SiteConfig
from engines.run_state import run_name
from reports.site.pictures import Illustrator, View
from reports.site.record import SiteRun
from reports.site.report import write_site_report
from semisam_core.errors import ConfigError
from semisam_core.files import append_json_line, read_json_lines, write_json
from semisam_core.plan import Plan
from tests.conftest import tiny_plan, write_site
from tests.reports.conftest import Ran
from tests.reports.pages import check_page, name_of, rows, text
from tests.reports.runs import run_study

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e"


@pytest.fixture
def copy(ran: Ran, tmp_path: Path) -> SiteConfig:
    """Return alpha with a copy of its storage that a test may change."""
    config = ran.site("alpha")
    storage = shutil.copytree(config.storage.folder, tmp_path / "storage")
    return config.model_copy(update={"storage": config.storage.model_copy(update={"folder": storage})})


def _views(config: SiteConfig, plan: Plan, case: str) -> dict[str, View]:
    (found,) = Illustrator(SiteRun.of(config, plan)).draw([case])
    return {view.title: view for view in found.views}


def _pixels(view: View) -> NDArray[np.float32]:
    assert view.png is not None
    pixels: NDArray[np.float32] = png.imread(io.BytesIO(base64.b64decode(view.png)), format="png")[..., :3]
    return pixels


def _coloured(view: View) -> NDArray[np.bool_]:
    """Return where a picture is not grey: its outlines."""
    pixels = _pixels(view)
    found: NDArray[np.bool_] = np.ptp(pixels, axis=-1) > 0.1
    return found


def test_the_page_is_valid_fetches_nothing_and_has_words_for_every_picture(ran: Ran) -> None:
    path = write_site_report(ran.site("alpha"), ran.plan)
    tree = check_page(path.read_text())
    pictures = [each for each in tree.iter() if name_of(each) == "img"]
    assert len(pictures) >= 3 * 3 + 4  # of three scored scans and an unlabeled one
    assert "This report stays at the site." in text(tree)


def test_only_its_owner_can_read_it_and_it_lies_in_the_sites_storage(ran: Ran) -> None:
    config = ran.site("alpha")
    path = write_site_report(config, ran.plan)
    assert path.is_relative_to(config.storage.folder)
    assert path.stat().st_mode & 0o077 == 0
    assert not any("site" in each.name and each.suffix == ".html" for each in ran.folder.iterdir())


def test_single_cases_stand_worst_first_and_are_those_of_the_last_round(ran: Ran) -> None:
    config = ran.site("alpha")
    tree = check_page(write_site_report(config, ran.plan).read_text())
    shown = rows(tree, "Single cases, worst first")
    lines = read_json_lines(config.storage.folder / "runs" / run_name(ran.folder) / "scores.jsonl")
    scores = {line["case"]: line["dice"] for line in lines if line["round"] == ran.plan.training.rounds}
    assert [row[0] for row in shown] == sorted(scores, key=lambda case: (scores[case], case))
    assert [row[2] for row in shown] == [f"{scores[row[0]]:.3f}" for row in shown]
    headings = ["".join(each.itertext()) for each in tree.iter("h3")]
    assert [each.split()[0] for each in headings[:3]] == [row[0] for row in shown[:3]]
    assert headings[3].startswith("case-1 (unlabeled)")


def test_an_unlabeled_scan_shows_its_pseudo_label_and_uncertainty_and_no_label(ran: Ran) -> None:
    views = _views(ran.site("alpha"), ran.plan, "case-1")
    assert views["label"].png is None
    assert views["label"].words == "none at this site"
    for title in ("pseudo-label", "prediction"):
        assert _coloured(views[title]).any(), title
        assert "outlines of blob" in views[title].words
        assert "axial, coronal and sagittal plane" in views[title].words
    assert not _coloured(views["scan"]).any()
    doubt = _pixels(views["uncertainty"])[..., 0]
    assert not _coloured(views["uncertainty"]).any()
    outline = _coloured(views["pseudo-label"])
    assert doubt[outline].mean() > 2 * doubt[~outline].mean()  # it is least sure along the border


def test_a_scored_scan_shows_its_label_and_no_pseudo_label(ran: Ran) -> None:
    views = _views(ran.site("alpha"), ran.plan, "case-2")
    assert _coloured(views["label"]).any()
    assert views["pseudo-label"].png is None
    assert views["uncertainty"].png is None


def test_all_pictures_of_a_scan_show_the_same_planes(ran: Ran) -> None:
    views = _views(ran.site("alpha"), ran.plan, "case-2")
    outlines = _coloured(views["label"]) | _coloured(views["prediction"])
    scan, label = _pixels(views["scan"]), _pixels(views["label"])
    np.testing.assert_array_equal(scan[~outlines], label[~outlines])


def test_the_prediction_is_that_of_the_specialist_scored_last(copy: SiteConfig, ran: Ran) -> None:
    folder = copy.storage.folder / "runs" / run_name(ran.folder)
    assert {path.name for path in folder.glob("scored-*")} == {"scored-00001.safetensors", "scored-00002.safetensors"}
    assert "the specialist after round 2" in text(check_page(write_site_report(copy, ran.plan).read_text()))
    for path in folder.glob("scored-*"):
        path.unlink()
    views = _views(copy, ran.plan, "case-2")
    assert views["prediction"].png is None
    assert "no specialist of this run has been scored here yet" in views["prediction"].words


def test_chosen_scans_are_shown_and_unknown_ones_refused_with_a_sentence(ran: Ran) -> None:
    config = ran.site("alpha")
    tree = check_page(write_site_report(config, ran.plan, cases=["case-0"]).read_text())
    assert ["".join(each.itertext()) for each in tree.iter("h3")] == ["case-0 (labeled): chosen by --case"]
    with pytest.raises(ConfigError, match="no usable case of that name"):
        write_site_report(config, ran.plan, cases=["case-99"])


def test_sources_are_those_that_were_logged(ran: Ran) -> None:
    config = ran.site("alpha")
    tree = check_page(write_site_report(config, ran.plan).read_text())
    lines = read_json_lines(config.storage.folder / "runs" / run_name(ran.folder) / "evidence.jsonl")
    assert [line["round"] for line in lines] == [1, 2, None]  # the last one is the final picture's and taught nothing
    expected = [
        [name, str(line["round"]), "blob", f"{share:.3f}", "-"]
        for line in lines[:2]
        for name, share in line["weights"].items()
    ]
    assert rows(tree, "sources by round") == sorted(expected)


def test_the_papers_method_logs_how_much_each_generalist_counted(tmp_path: Path, ran: Ran) -> None:
    plan = tiny_plan("training.rounds=1")
    data = tmp_path / "data" / "alpha"
    shutil.copytree(ran.site("beta").data.images.parent, data)
    (config,) = run_study(plan, [write_site(tmp_path, "alpha")], tmp_path / "run")
    tree = check_page(write_site_report(config, plan).read_text())
    assert rows(tree, "sources by round") == [["fake", "1", "blob", "1.000", "-"]]


def test_what_left_is_that_of_the_audit_log(ran: Ran) -> None:
    config = ran.site("gamma")
    tree = check_page(write_site_report(config, ran.plan).read_text())
    left = rows(tree, "what left, message by message")
    assert [row[1] for row in left] == ["join", "train", "evaluate", "train", "evaluate"]
    scores = [row for row in left if row[1] == "evaluate"]
    assert all("dice.blob" in row[4] for row in scores)


def test_text_from_elsewhere_is_shown_and_not_obeyed(copy: SiteConfig, ran: Ran) -> None:
    folder = copy.storage.folder / "runs" / run_name(ran.folder)
    write_json(folder / "quarantine.json", [{"case": HOSTILE, "reason": HOSTILE}])
    score = {"round": 2, "case": HOSTILE, "class": HOSTILE, "dice": 0.1, "hd95_mm": None, "surface_dice": 0.0}
    append_json_line(folder / "scores.jsonl", score)
    page = write_site_report(copy, ran.plan).read_text()
    assert "<script>alert(1)</script>" in text(check_page(page))
    assert "\u202e" not in page


def test_a_run_that_was_never_here_is_refused_with_a_sentence(ran: Ran) -> None:
    config = ran.site("alpha")
    with pytest.raises(ConfigError, match="has answered nothing under this plan"):
        SiteRun.of(config, tiny_plan("seed=99"))
    with pytest.raises(ConfigError, match=f"Runs here: .*{run_name(ran.folder)}"):
        SiteRun.of(config, ran.plan, "another")
    with pytest.raises(ConfigError, match="a run's name has"):
        SiteRun.of(config, ran.plan, "../../elsewhere")


def test_a_round_that_was_repeated_counts_once(ran: Ran) -> None:
    site = SiteRun.of(ran.site("alpha"), ran.plan)
    doubled = replace(site, scores=[*site.scores, *site.scores])
    assert doubled.final_scores == site.final_scores


def test_the_command_writes_it_for_a_simulated_site(ran: Ran) -> None:
    yaml = ran.folder.parent / "sites" / "beta.yaml"
    options = ["--site", str(yaml), "--plan", str(ran.folder / "plan.yaml"), "--case", "case-2"]
    done = CliRunner().invoke(app, ["site", "report", *options])
    assert done.exit_code == 0, done.output
    path = ran.site("beta").storage.folder / "runs" / run_name(ran.folder) / "report.html"
    assert f"stays at this site: {path}" in done.output
    check_page(path.read_text())
    assert json.loads((ran.folder / "run.json").read_text())["run"] in path.read_text()
