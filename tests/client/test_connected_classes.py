"""Classes that the plan calls connected: distant islands in a prediction are neither scored nor drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from client.site import Site
from client.site_config import SiteConfig, load_site_config
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.reporting.overview import COLOURS
from tests.conftest import tiny_plan, write_nifti, write_site

Trained = tuple[SiteConfig, dict[str, torch.Tensor]]
SHAPE = (40, 24, 16)
ORGAN, ISLAND = ((10, 12, 8), 6.0), ((33, 12, 8), 4.0)
APART_MM = 2.0 * (ISLAND[0][0] - ISLAND[1] - ORGAN[0][0] - ORGAN[1])  # between their surfaces; voxels have 2 mm


def _ball(centre: tuple[int, int, int], radius: float) -> NDArray[np.bool_]:
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij"), -1)
    inside: NDArray[np.bool_] = np.linalg.norm(grid - centre, axis=-1) < radius
    return inside


def _write_case(folder: Path, name: str, seed: int, island: bool) -> None:
    """Write a scan with a bright organ and optionally a distant island that is as bright but not part of it."""
    bright = _ball(*ORGAN) | _ball(*ISLAND) if island else _ball(*ORGAN)
    image = (100 * bright + np.random.default_rng(seed).normal(0, 10, SHAPE)).astype(np.float32)
    write_nifti(folder / "images" / f"{name}.nii.gz", image)
    write_nifti(folder / "labels" / f"{name}.nii.gz", _ball(*ORGAN).astype(np.uint8))


def _plan(connected: bool) -> Plan:
    return tiny_plan(
        f"task.classes=[{{name: organ, value: 1, connected: {str(connected).lower()}}}]",
        "training.rounds=1",
        "training.steps_per_round=60",
        "training.optimizer.learning_rate=0.01",
        "regularizer.name=none",
        "pseudo_labels=null",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a site and a specialist that has learned there to take everything bright for the organ."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("connected")
    for k, name in enumerate(("case-0", "case-1", "case-2")):
        _write_case(folder / "data" / "alpha", name, k, island=name == "case-2")
    config = load_site_config(write_site(folder, "alpha", generalists={}))
    plan = _plan(connected=False)
    weights = Site(config, plan, "train", 1).train(dict(new_specialist(plan).state_dict())).weights
    assert weights is not None
    return config, weights


def _evaluated(trained: Trained, connected: bool) -> tuple[dict[str, float | int], Site]:
    config, weights = trained
    site = Site(config, _plan(connected), uuid4().hex, 1)
    return site.evaluate(weights, final=True).scalars, site


def _picture(site: Site) -> NDArray[Any]:
    """Return a site's picture, (H, W, 3) in 0..255."""
    with Image.open(site.state.folder / "overview.png") as picture:
        pixels: NDArray[Any] = np.asarray(picture.convert("RGB")).astype(int)
    return pixels


def _share_of_outlines_on_the_right(pixels: NDArray[Any]) -> float:
    """Return the share of the prediction's outline in the right third of its column, where the island is."""
    column = pixels[:, 3 * pixels.shape[1] // 4 :]
    wanted = [int(COLOURS[0][k : k + 2], 16) for k in (1, 3, 5)]
    outline = (np.abs(column - wanted) < 40).all(-1)
    assert outline.sum() > 50
    return float(outline[:, 2 * outline.shape[1] // 3 :].sum() / outline.sum())


def test_a_distant_island_counts_unless_the_structure_is_connected(trained: Trained) -> None:
    (with_island, _), (without, _) = _evaluated(trained, connected=False), _evaluated(trained, connected=True)
    assert with_island["hd95_mm.organ"] > APART_MM
    assert without["hd95_mm.organ"] < 6.0
    assert without["dice.organ"] > with_island["dice.organ"] + 0.1
    assert without["dice.organ"] > 0.85


def test_per_case_scores_at_the_site_match_the_scores_sent(trained: Trained) -> None:
    scalars, site = _evaluated(trained, connected=True)
    (line,) = read_json_lines(site.state.folder / "scores.jsonl")
    assert line["hd95_mm"] == scalars["hd95_mm.organ"]


def test_the_picture_shows_the_scored_segmentation(trained: Trained) -> None:
    with_island, without = (_picture(_evaluated(trained, connected)[1]) for connected in (False, True))
    assert _share_of_outlines_on_the_right(with_island) > 0.2
    assert _share_of_outlines_on_the_right(without) == 0
