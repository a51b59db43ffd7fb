"""Generalists prompted with the true masks: which prompts reach them, and how each case is scored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from experiments.comparison.oracle import OracleFailedError, execute
from semisam_core.files import read_json_lines
from semisam_core.generalists import GeneralistSpec, PromptKind, Prompts, Segmentation, VolumeGrid, registry
from tests.conftest import tiny_plan, write_balls, write_site
from tests.semisam_core.generalists.fake import CARD, FakeGeneralist

REACH = 4.0  # voxels


class Clicker(FakeGeneralist):
    """Takes the bright voxels near each positive click in the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.card = replace(CARD, name="clicker", prompt_kinds=frozenset({PromptKind.POINTS_3D}))
        self.grids: list[VolumeGrid] = []

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        return (0,)

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        return {unit: volume.clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        self.prompts.append(prompts)
        self.grids.append(grid)
        places = torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid.shape), indexing="ij"), -1).float()
        near = torch.zeros(grid.shape, dtype=torch.bool)
        for point in prompts.points:
            if point.positive:
                near |= (places - torch.tensor(point.position)).norm(dim=-1) <= REACH
        return Segmentation(torch.sigmoid(6 * embeddings[0]) * near, {0: 0.9})


@pytest.fixture
def clicker(monkeypatch: pytest.MonkeyPatch) -> Clicker:
    model = Clicker()
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    monkeypatch.setattr(registry, "_loaded", {})
    registry.register(GeneralistSpec(model.card, lambda *_: model, packaged=True))
    return model


MakeSite = Callable[..., Path]
HAS_CLICKER = {"generalists": {"clicker": {"weights": "packaged"}}}
TWO = (
    "task.classes=[{name: first, value: 1}, {name: second, value: 2}]",
    "task.ignore_other_values=true",
)


def _write_plan(folder: Path, *assignments: str) -> Path:
    shown = tiny_plan("pseudo_labels.generalists=[clicker]", "pseudo_labels.prompting.strategy=points", *assignments)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(shown.model_dump(mode="json")))
    return path


def _ask(folder: Path, clicks: int, *assignments: str) -> list[dict[str, Any]]:
    """Run the oracle on the sites in a folder and return the scores in alpha's storage."""
    run = folder / f"oracle-{clicks}"
    execute(_write_plan(folder, *assignments), folder / "sites", run, "clicker", clicks)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "completed"
    return list(read_json_lines(folder / "storage" / "alpha" / "runs" / status["run"] / "scores.jsonl"))


def test_clicks_follow_one_another_and_more_of_them_find_more(
    make_site: MakeSite, tmp_path: Path, clicker: Clicker
) -> None:
    make_site(**HAS_CLICKER)
    dice = []
    for clicks in (1, 3, 10):
        clicker.prompts.clear()
        (line,) = _ask(tmp_path, clicks)
        assert 1 <= len(clicker.prompts) <= clicks
        assert (line["case"], line["class"]) == ("case-2", "blob")
        dice.append(line["dice"])
    assert dice[0] < dice[1] <= dice[2]


def test_a_generalist_sees_the_grid_of_its_pseudo_labels(make_site: MakeSite, tmp_path: Path, clicker: Clicker) -> None:
    make_site(**HAS_CLICKER)
    _ask(tmp_path, 1, "data.spacing_mm=[4, 4, 4]", "pseudo_labels.spacing_mm=[2, 2, 2]")
    assert {grid.spacing_mm for grid in clicker.grids} == {(2.0, 2.0, 2.0)}
    assert {grid.shape for grid in clicker.grids} == {(24, 24, 16)}


def test_no_negative_clicks_in_other_classes_are_added(tmp_path: Path, clicker: Clicker) -> None:
    write_balls(tmp_path / "data" / "alpha", 3)
    write_site(tmp_path, "alpha", **HAS_CLICKER)
    lines = _ask(tmp_path, 1, *TWO)
    assert [line["class"] for line in lines] == ["first", "second"]
    assert [[point.positive for point in prompts.points] for prompts in clicker.prompts] == [[True], [True]]


def test_only_classes_that_the_site_annotates_are_prompted_and_scored(tmp_path: Path, clicker: Clicker) -> None:
    write_balls(tmp_path / "data" / "alpha", 3)
    write_site(tmp_path, "alpha", data={"labeled_classes": ["second"]}, **HAS_CLICKER)
    (line,) = _ask(tmp_path, 1, *TWO)
    assert line["class"] == "second"
    assert line["dice"] > 0.1
    assert len(clicker.prompts) == 1
    _ask(tmp_path, 1, *TWO)
    assert len(clicker.prompts) == 1  # every case had its score


def test_an_oracle_that_can_score_no_case_fails_and_says_why(
    make_site: MakeSite, tmp_path: Path, clicker: Clicker, caplog: pytest.LogCaptureFixture
) -> None:
    make_site(**HAS_CLICKER)
    (tmp_path / "data" / "alpha" / "images" / "case-2.nii.gz").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING), pytest.raises(OracleFailedError, match="no validation case could be scored"):
        _ask(tmp_path, 1)
    assert "case-2: the image file cannot be read" in caplog.text
    status = json.loads((tmp_path / "oracle-1" / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith("clicker: no validation case could be scored in ")
