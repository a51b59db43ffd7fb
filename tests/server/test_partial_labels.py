"""Two hospitals that each annotated one of two structures: the global specialist learns both."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from client.app import app as client_app
from client.site import Site
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from experiments.checks import check_study, study_table
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import load_scan
from semisam_core.errors import ConfigError
from semisam_core.evaluation import dice_of
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist, predict, segmentation
from semisam_core.plan import Plan
from server.app import app as server_app
from tests.conftest import balls, tiny_plan, write_balls, write_nifti, write_site

NAMES = ("first", "second")
PLAN = (
    "task.classes=[{name: first, value: 1}, {name: second, value: 2}]",
    "pseudo_labels=null",
    "regularizer.name=none",
    "specialist.arguments.channels=[8, 16]",
    "training.rounds=4",
    "training.steps_per_round=40",
    "training.optimizer.learning_rate=0.02",
    "training.augmentation={flip: 0, affine_probability: 0, intensity: 0, noise: 0}",
    "evaluation.every_rounds=4",
)


def _write_sites(folder: Path, partial: bool) -> list[Path]:
    """Write two sites whose labels mark one structure each; with `partial`, their files say which."""
    paths = []
    for k, name in enumerate(NAMES, start=1):
        site = f"has-{name}"
        write_balls(folder / "data" / site, 3, 10 * k, (k,))
        data = {"labeled": ["case-0", "case-1"], "labeled_classes": [name] if partial else "all"}
        paths.append(write_site(folder, site, data=data))
    return paths


def _published(folder: Path, plan: Plan, partial: bool) -> dict[str, torch.Tensor]:
    paths = _write_sites(folder, partial)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(file), "num-sites": 2, "run-folder": str(folder / "run")}
    run_in_process(server_app, client_app, [{"site-config": str(path)} for path in paths], config)
    return load_file(folder / "run" / "best.safetensors")


def _dice(weights: dict[str, torch.Tensor], plan: Plan, folder: Path) -> list[float]:
    """Return the Dice of both structures on an unseen patient whose label marks both."""
    image, label = balls(99)
    label[label == 3] = 0
    files = [write_nifti(folder / f"{kind}.nii.gz", each) for kind, each in (("i", image), ("l", label))]
    scan = load_scan(Case("new", (files[0],), files[1], Role.VALIDATION), plan)
    specialist = new_specialist(plan)
    specialist.load_state_dict(weights)
    answer = segmentation(predict(specialist, scan.image, plan, torch.device("cpu")), plan)
    assert scan.label is not None
    return [dice_of(answer == k, scan.label == k) for k in (1, 2)]


def test_the_global_specialist_learns_both_structures_unless_unannotated_ones_count_as_background(
    tmp_path: Path,
) -> None:
    plan = tiny_plan(*PLAN)
    scores = {}
    for partial in (True, False):
        folder = tmp_path / str(partial)
        scores[partial] = _dice(_published(folder, plan, partial), plan, folder)
    assert min(scores[True]) > 0.7
    assert min(scores[True]) > min(scores[False]) + 0.2
    lines = [
        line for line in read_json_lines(tmp_path / "True" / "run" / "metrics.jsonl") if line["event"] == "evaluated"
    ]
    for line in lines:
        own, other = NAMES if line["site"] == "has-first" else NAMES[::-1]
        assert line[f"cases.{own}"] == 1
        assert f"dice.{own}" in line
        assert not any(key.endswith(f".{other}") for key in line)


def test_a_site_scores_only_the_classes_it_annotated(tmp_path: Path) -> None:
    plan = tiny_plan(*PLAN)
    site = Site(load_site_config(_write_sites(tmp_path, True)[1]), plan, "run", 1)
    scalars = site.evaluate(dict(new_specialist(plan).state_dict()), final=True).scalars
    assert {name.split(".")[-1] for name in scalars} == {"validation", "second"}
    assert [line["class"] for line in read_json_lines(site.state.folder / "scores.jsonl")] == ["second"]


def test_labels_of_a_class_that_the_site_file_does_not_name_change_nothing(tmp_path: Path) -> None:
    plan = tiny_plan(*PLAN, "training.steps_per_round=2")
    path = _write_sites(tmp_path, True)[0]
    weights = dict(new_specialist(plan).state_dict())
    before = Site(load_site_config(path), plan, "before", 1)
    trained, scores = before.train(weights).weights, before.evaluate(weights, final=False).scalars
    write_balls(tmp_path / "data" / "has-first", 3, 10, (1, 2))
    after = Site(load_site_config(path), plan, "after", 1)
    again = after.train(weights).weights
    assert trained is not None
    assert again is not None
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert after.evaluate(weights, final=False).scalars == scores


def test_check_shows_which_classes_each_site_annotated_and_refuses_a_class_without_annotations(tmp_path: Path) -> None:
    _write_sites(tmp_path, True)
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(tiny_plan(*PLAN).model_dump(mode="json")))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(study_table(check_study(file, tmp_path / "sites", [])))
    text = console.export_text()
    assert "2 (first)" in text
    assert "2 (second)" in text
    (tmp_path / "sites" / "has-second.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no site with labeled cases names second under data\.labeled_classes"):
        check_study(file, tmp_path / "sites", [])
