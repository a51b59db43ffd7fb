"""A generalist with true clicks: more of them, a better answer; scored like a run, case by case."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from cli.comparison.oracle import execute
from semisam_core.files import read_json_lines
from semisam_core.generalists import GeneralistSpec, PromptKind, Prompts, Segmentation, VolumeGrid, registry
from tests.conftest import tiny_plan
from tests.semisam_core.generalists.fake import CARD, FakeGeneralist

REACH = 4.0  # voxels


class Clicker(FakeGeneralist):
    """Takes the bright voxels near each positive click in the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.card = replace(CARD, name="clicker", prompt_kinds=frozenset({PromptKind.POINTS_3D}))

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        return (0,)

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        return {unit: volume.clone() for unit in units}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        self.prompts.append(prompts)
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


def test_true_clicks_are_put_one_after_another_and_more_of_them_find_more(
    make_site: Callable[..., Path], tmp_path: Path, clicker: Clicker
) -> None:
    make_site(generalists={"clicker": {"weights": "packaged"}})
    plan = tmp_path / "plan.yaml"
    shown = tiny_plan("pseudo_labels.generalists=[clicker]", "pseudo_labels.prompting.strategy=points")
    plan.write_text(yaml.safe_dump(shown.model_dump(mode="json")))
    dice = []
    for clicks in (1, 3, 10):
        clicker.prompts.clear()
        folder = tmp_path / f"oracle-{clicks}"
        execute(plan, tmp_path / "sites", folder, "clicker", clicks)
        assert 1 <= len(clicker.prompts) <= clicks
        status = json.loads((folder / "status.json").read_text())
        assert status["state"] == "completed"
        (line,) = read_json_lines(tmp_path / "storage" / "alpha" / "runs" / status["run"] / "scores.jsonl")
        assert (line["case"], line["class"]) == ("case-2", "blob")
        dice.append(line["dice"])
    assert dice[0] < dice[1] <= dice[2]
