"""Three structures, one small and two touching: prompted, gated, counted and scored class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from client.report import SiteReport
from client.site import Site
from client.site_config import load_site_config
from semisam_core.files import read_json_lines
from semisam_core.generalists.base import PromptKind, Prompts, Segmentation, VolumeGrid
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.conftest import balls, tiny_plan, write_balls, write_site
from tests.semisam_core.generalists.fake import FakeGeneralist

NAMES = ("large", "touching", "small")
CLASSES = "task.classes=[" + ", ".join(f"{{name: {name}, value: {k}}}" for k, name in enumerate(NAMES, start=1)) + "]"
CLICKED = (
    "pseudo_labels.generalists=[sam-med3d]",
    "pseudo_labels.prompting.strategy=points",
    "pseudo_labels.prompting.clicks=1",
)


class Clicked(FakeGeneralist):
    """Takes 3D clicks and returns the bright components clicked, cut where a negative click is nearer."""

    def __init__(self) -> None:
        super().__init__()
        self.card = replace(self.card, name="sam-med3d", prompt_kinds=frozenset({PromptKind.POINTS_3D}))

    def units(self, prompts: Prompts, grid: VolumeGrid) -> tuple[int, ...]:
        return (0,)

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        return {0: volume.clone()}

    def segment(self, embeddings: Mapping[int, Tensor], prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        self.prompts.append(prompts)
        volume = embeddings[0].numpy()
        components, _ = ndimage.label(volume > np.percentile(volume, 80))
        near = {True: np.full(volume.shape, np.inf), False: np.full(volume.shape, np.inf)}
        touched = set()
        for point in prompts.points:
            away = np.ones(volume.shape, bool)
            away[tuple(int(side) for side in point.position)] = False
            near[point.positive] = np.minimum(near[point.positive], ndimage.distance_transform_edt(away))
            if point.positive:
                touched.add(int(components[~away][0]))
        answer = np.isin(components, sorted(touched - {0})) & (near[True] <= near[False])
        return Segmentation(torch.from_numpy(0.9 * answer.astype(np.float32)), {0: 0.9})


def _plan(*changes: str) -> Plan:
    return tiny_plan(
        CLASSES,
        "training.steps_per_round=80",
        "training.optimizer.learning_rate=0.02",
        "training.augmentation={flip: 0, affine_probability: 0, intensity: 0, noise: 0}",
        "specialist.arguments.channels=[8, 16]",
        *changes,
    )


def _site(folder: Path, plan: Plan, number: int = 1, **changes: object) -> Site:
    write_balls(folder / "data" / "alpha", 4)
    path = write_site(folder, "alpha", **({"data": {"labeled": ["case-0", "case-3"]}} | changes))
    return Site(load_site_config(path), plan, "run", number)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Return the weights of a specialist trained on two labeled scans of the three structures."""
    torch.set_num_threads(1)
    folder, plan = tmp_path_factory.mktemp("taught"), _plan("pseudo_labels=null", "regularizer.name=none")
    weights: dict[str, Tensor] = dict(new_specialist(plan).state_dict())
    for number in (1, 2):
        sent = _site(folder, plan, number).train(weights).weights
        assert sent is not None
        weights = sent
    return weights


def _label_with_clicks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, taught: dict[str, Tensor], *changes: str
) -> tuple[Clicked, Site, SiteReport]:
    model = Clicked()
    monkeypatch.setattr("client.labeling.load_generalist", lambda *_: model)
    entry = {"sam-med3d": {"weights": "w.pth", "sha256": "a" * 64}}
    site = _site(folder, _plan(*CLICKED, "training.steps_per_round=1", *changes), 2, generalists=entry)
    return model, site, site.train(taught)


def test_every_class_is_learned_and_scored_under_its_name(tmp_path: Path, taught: dict[str, Tensor]) -> None:
    site = _site(tmp_path, _plan(), 2)
    scalars = site.evaluate(taught, final=True).scalars
    assert [scalars[f"cases.{name}"] for name in NAMES] == [1, 1, 1]
    assert all(scalars[f"dice.{name}"] > 0.75 for name in NAMES)
    lines = read_json_lines(site.state.folder / "scores.jsonl")
    assert {line["class"]: line["dice"] for line in lines} == {name: scalars[f"dice.{name}"] for name in NAMES}


def test_pseudo_labels_are_gated_per_class_and_counted_in_the_sites_log(
    tmp_path: Path, taught: dict[str, Tensor]
) -> None:
    small_ml = float((balls(1)[1] == 3).sum()) * 8 / 1000
    plan = _plan("training.steps_per_round=1", f"pseudo_labels.gates.minimum_volume_ml={1.5 * small_ml}")
    site = _site(tmp_path, plan, 2)
    scalars = site.train(taught).scalars
    lines = read_json_lines(site.state.folder / "gates.jsonl")
    assert [(line["class"], line["accepted"], line["gated"]) for line in lines] == [
        ("large", 1, 0),
        ("touching", 1, 0),
        ("small", 0, 1),
    ]
    assert lines[2]["gated.too-small"] == 1
    assert (scalars["accepted"], scalars["gated"], scalars["gated.too-small"]) == (2, 1, 1)


def test_each_class_gets_positive_clicks_and_the_others_negative_ones(
    tmp_path: Path, taught: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = _label_with_clicks(tmp_path, monkeypatch, taught)
    truth = balls(1)[1]
    asked = []
    for prompts in model.prompts:
        inside, outside = (
            {int(truth[tuple(int(side) for side in p.position)]) for p in prompts.points if p.positive is positive}
            for positive in (True, False)
        )
        assert len(inside) == len(outside) == 1
        assert not outside & (inside | {0})
        asked += list(inside)
    assert sorted(set(asked)) == [1, 2, 3]


def test_no_voxel_belongs_to_two_classes_even_without_negative_clicks(
    tmp_path: Path, taught: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = {}
    for aware in ("true", "false"):
        folder = tmp_path / aware
        _, site, report = _label_with_clicks(
            folder, monkeypatch, taught, f"pseudo_labels.prompting.class_aware={aware}"
        )
        assert report.scalars["accepted"] == 3
        (kept,) = (site.state.folder / "pseudo_labels").glob("*.safetensors")
        label = PseudoLabelStore(kept.parent).load(kept.stem)
        assert label is not None
        assert int((label.target > 0.5).sum(0).max()) == 1
        assert int((label.generalist > 0.5).sum(0).max()) == 1
        sites[aware] = label
    truth = torch.from_numpy(balls(1)[1])
    touching = [((sites[aware].generalist[1] > 0.5) & (truth == 2)).sum() for aware in ("true", "false")]
    assert touching[0] > touching[1]  # negative clicks keep the large one from swallowing its neighbour


def test_plausible_volumes_are_learned_per_class(tmp_path: Path, taught: dict[str, Tensor]) -> None:
    plan = _plan("training.steps_per_round=1", "pseudo_labels.gates.volume_factor=1.5")
    site = _site(tmp_path, plan, 2)
    assert site.train(taught).scalars["accepted"] == 3
