"""Scores on scans that a study used as unlabeled: analysis after the run, from labels that no site could read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from client.app import app as client_app
from client.site_config import SiteConfig, load_site_config
from engines.in_process_grid import run_in_process
from engines.results import SiteResult, results_table
from engines.run_state import run_name
from experiments.unlabeled import UnlabeledScore, mean_scores, score_unlabeled
from semisam_core.data.cases import Role, find_cases
from semisam_core.data.scans import load_scan, prepared_key
from semisam_core.evaluation import dice_of
from semisam_core.inference import new_specialist, predict, segmentation
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.store import PseudoLabelStore
from server.app import app as server_app
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
EVIDENCE = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources.prototypes={generalist: fake}",
    "pseudo_labels.gates.minimum_volume_ml=0.0",
    "pseudo_labels.refresh_every=2",
    "training.rounds=4",
)


def _run(plan: Plan, sites: list[Path], folder: Path) -> list[SiteConfig]:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    return [load_site_config(site) for site in sites]


def test_scores_are_those_of_the_stored_pseudo_label_and_of_the_specialists_before_and_after(
    make_site: MakeSite, tmp_path: Path
) -> None:
    plan, folder = tiny_plan(*EVIDENCE), tmp_path / "run"
    (config,) = _run(plan, [make_site()], folder)
    (score,) = score_unlabeled(plan, [config], folder, run_name(folder))
    assert (score.site, score.case, score.target) == ("alpha", "case-1", "blob")
    assert config.data.labels is not None
    cases = find_cases(config.data.images, config.data.labels, 1, None, ())
    case = next(case for case in cases.of(Role.LABELED) if case.id == "case-1")
    scan = load_scan(case, plan)
    key = prepared_key(replace(case, label=None, role=Role.UNLABELED), plan)
    assert scan.label is not None
    truth = scan.label == 1
    stored = PseudoLabelStore(config.storage.folder / "runs" / run_name(folder) / "pseudo_labels")
    label = stored.load(key)
    assert label is not None
    assert score.pseudo_label == dice_of(label.target[0] > 0.5, truth)
    assert score.pseudo_label > 0.7
    found = []
    for number in (2, 4):  # pseudo-labels were refreshed in rounds 1 and 3
        specialist = new_specialist(plan)
        specialist.load_state_dict(load_file(folder / "checkpoints" / f"round-{number:05d}.safetensors"))
        mask = segmentation(predict(specialist, scan.image, plan, torch.device("cpu")), plan) == 1
        found.append(dice_of(torch.as_tensor(mask), truth))
    assert [score.prompting, score.final] == found


def test_labeled_and_validation_scans_are_not_scored(make_site: MakeSite, tmp_path: Path) -> None:
    plan, folder = tiny_plan("pseudo_labels=null"), tmp_path / "run"
    sites = [make_site("alpha", cases=5), make_site("beta", first_seed=10, data={"labeled": "all"})]
    configs = _run(plan, sites, folder)
    scores = score_unlabeled(plan, configs, folder, run_name(folder))
    assert [(score.site, score.case) for score in scores] == [("alpha", f"case-{k}") for k in (1, 3, 4)]
    assert {(score.prompting, score.pseudo_label) for score in scores} == {(None, None)}


def test_a_scan_without_a_label_file_or_that_cannot_be_read_is_left_out(make_site: MakeSite, tmp_path: Path) -> None:
    plan, folder = tiny_plan("pseudo_labels=null"), tmp_path / "run"
    path = make_site("alpha", cases=5)
    (tmp_path / "data" / "alpha" / "labels" / "case-3.nii.gz").unlink()
    (tmp_path / "data" / "alpha" / "images" / "case-4.nii.gz").write_bytes(b"torn")
    configs = _run(plan, [path], folder)
    assert [score.case for score in score_unlabeled(plan, configs, folder, run_name(folder))] == ["case-1"]


def test_where_batch_norm_stays_at_the_sites_nothing_is_scored(make_site: MakeSite, tmp_path: Path) -> None:
    arguments = "{channels: [4, 8], strides: [2], residual_units: 0, normalization: batch}"
    local = f"specialist={{name: unet, arguments: {arguments}, statistics: local}}"
    plan = tiny_plan(local, "pseudo_labels=null")
    assert score_unlabeled(plan, [load_site_config(make_site())], tmp_path, "run") == []


def test_pseudo_labels_are_compared_with_what_prompted_them_on_accepted_scans_only() -> None:
    scores = [
        UnlabeledScore("a", "1", "blob", prompting=0.2, pseudo_label=None, final=0.9),
        UnlabeledScore("a", "2", "blob", prompting=0.6, pseudo_label=0.8, final=0.7),
        UnlabeledScore("a", "3", "blob", prompting=0.4, pseudo_label=0.6, final=0.5),
    ]
    means = mean_scores(scores)
    assert (means.scans, means.prompting, means.pseudo_label) == (3, pytest.approx(0.5), pytest.approx(0.7))
    assert means.final == pytest.approx(0.7)
    assert mean_scores([]).final is None


def test_the_table_has_the_column_only_if_there_are_scores() -> None:
    plain = SiteResult("a", "blob", 1, 3, 2, 0, 3, 0, None, None, 0.8, 2.0, 0)
    scored = SiteResult("a", "blob", 1, 3, 2, 0, 3, 0, None, None, 0.8, 2.0, 0, 3, 0.51, 0.72, 0.83)
    shown = []
    for result in (plain, scored):
        console = Console(width=160, record=True)
        console.print(results_table([result], "study", "last round"))
        shown.append(console.export_text())
    assert "Unlabeled" not in shown[0]
    assert "0.510 / 0.720 / 0.830" in shown[1]
