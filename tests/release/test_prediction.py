"""A prediction is what a site's evaluation scores; several models count by their mean probability."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from client.site import Site
from client.site_config import load_site_config
from release.memory import needed_gb
from release.model import ModelError, TrainedModel, load_model
from release.prediction import Predictor
from semisam_core.data import resampling
from semisam_core.data.geometry import Geometry
from semisam_core.data.scans import prepare_image, to_original
from semisam_core.errors import CaseError
from semisam_core.evaluation import score_case
from semisam_core.inference import only_connected, predict, segment_original
from semisam_core.plan import Plan
from tests.conftest import blob, tiny_plan, write_nifti
from tests.release.runs import TWO_CLASSES, sharp_weights, write_run

CPU = torch.device("cpu")
COIN = math.log(2) / math.log(3)  # entropy of a coin, where three classes are possible
OBLIQUE = np.array([[0.0, -1.9, 0.3, 11.0], [1.4, 0.1, 0.2, -7.0], [0.2, 0.3, 2.4, 3.0], [0, 0, 0, 1]])


def _model(folder: Path, plan: Plan, gain: float = 2.0) -> TrainedModel:
    return load_model(write_run(folder, plan, sharp_weights(plan, gain)))


def _grid(shape: tuple[int, int, int]) -> Geometry:
    return Geometry(shape, torch.from_numpy(OBLIQUE.copy()))


def test_it_is_voxel_by_voxel_what_the_site_scores(
    tmp_path: Path, plan: Plan, make_site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = make_site(), _model(tmp_path / "run", plan)
    image = tmp_path / "data" / "alpha" / "images" / "case-2.nii.gz"  # the validation scan
    label = tmp_path / "data" / "alpha" / "labels" / "case-2.nii.gz"
    for file, content in zip((image, label), blob(seed=2), strict=True):
        write_nifti(file, content, OBLIQUE)
    scored: list[Tensor] = []
    original = score_case

    def spy(found: Tensor, *rest: object) -> object:
        scored.append(found.clone())
        return original(found, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("client.site.score_case", spy)
    site = Site(load_site_config(path), plan, "run", 1)
    site.join()
    site.evaluate(sharp_weights(plan), final=False)
    voxels = np.asarray(nib.load(image).dataobj, dtype=np.float32)
    found = Predictor([model], CPU).segment(voxels[None], Geometry(voxels.shape, torch.from_numpy(OBLIQUE)), "x")
    assert len(scored) == 1
    assert 0 < int(scored[0].sum()) < scored[0].numel()
    assert np.array_equal(found.labels, scored[0].numpy())


def test_several_models_count_by_their_mean_probability_each_on_its_own_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [tiny_plan(TWO_CLASSES), tiny_plan(TWO_CLASSES, "seed=1", "data.spacing_mm=[1.7, 2.5, 2.0]")]
    models = [_model(tmp_path / f"run-{k}", plan, 2.5) for k, plan in enumerate(plans)]
    stack, grid = blob((20, 22, 14))[0][None], _grid((20, 22, 14))
    parts = []
    for model in models:
        scan = prepare_image("x", stack.copy(), grid, model.plan.data)
        parts.append(to_original(predict(model.specialist, scan.image, model.plan, CPU), scan))
    mean = torch.stack(parts).mean(0)
    monkeypatch.setattr(resampling, "BLOCK_BYTES", 30_000)  # several blocks
    found = Predictor(models, CPU).segment(stack, grid, "x", uncertainty=True)
    indices = only_connected(mean.argmax(0), plans[0]).numpy()
    assert np.array_equal(found.labels, np.array([0, 3, 5])[indices])
    assert {0, 3, 5} == set(np.unique(found.labels).tolist())
    assert not np.array_equal(indices, parts[0].argmax(0).numpy())  # the second one has a say
    entropy = torch.special.entr(mean).sum(0) / math.log(3)
    assert np.allclose(found.maps["uncertainty"], entropy.numpy(), atol=1e-4)
    apart = torch.special.entr(mean).sum(0) - torch.stack([torch.special.entr(each).sum(0) for each in parts]).mean(0)
    assert np.allclose(found.maps["disagreement"], apart.numpy() / math.log(2), atol=1e-4)
    assert found.maps["disagreement"].max() > 0.02
    voxel_ml = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    assert found.volumes_ml == {
        "left-atrium": pytest.approx((indices == 1).sum() * voxel_ml, abs=1e-4),
        "outer-shell": pytest.approx((indices == 2).sum() * voxel_ml, abs=1e-4),
    }


def test_uncertainty_changes_no_label(tmp_path: Path, plan: Plan) -> None:
    model = _model(tmp_path, plan)
    stack, grid = blob()[0][None], _grid((24, 24, 16))
    with_map = Predictor([model], CPU).segment(stack.copy(), grid, "x", uncertainty=True)
    without = Predictor([model], CPU).segment(stack.copy(), grid, "x")
    scan = prepare_image("x", stack, grid, plan.data)
    assert np.array_equal(with_map.labels, without.labels)
    assert np.array_equal(without.labels, segment_original(model.specialist, scan, plan, CPU).numpy())
    assert (list(with_map.maps), without.maps) == (["uncertainty"], {})


class _Answers(nn.Module):
    """A specialist that answers the same logits everywhere."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, patches: Tensor) -> Tensor:
        return self.logits[None, :, None, None, None].expand(len(patches), -1, *patches.shape[2:])


@pytest.mark.parametrize(
    ("answers", "uncertainty", "disagreement"),
    [
        (((50, 0, 0), (50, 0, 0)), 0, 0),  # certain, of the same
        (((1, 1, 1), (1, 1, 1)), 1, 0),  # undecided, both
        (((50, 0, 0), (0, 50, 0)), COIN, 1),  # both certain, of different classes
        (((50, 0, 0), (0, 50, 0), (0, 0, 50)), 1, 1),
        (
            ((50, 0, 0), (50, 0, 0), (0, 50, 0), (0, 0, 50)),
            math.log(2) * 1.5 / math.log(3),
            math.log(2) * 1.5 / math.log(3),
        ),
    ],
)
def test_disagreement_is_what_models_do_not_doubt_by_themselves(
    answers: tuple[tuple[float, ...], ...], uncertainty: float, disagreement: float
) -> None:
    plan = tiny_plan(TWO_CLASSES)
    models = [TrainedModel(Path("x"), plan, _Answers(*each), "0" * 64, None) for each in answers]
    maps = Predictor(models, CPU).segment(blob()[0][None], _grid((24, 24, 16)), "x", uncertainty=True).maps
    assert maps["uncertainty"] == pytest.approx(uncertainty, abs=1e-4)
    assert maps["disagreement"] == pytest.approx(disagreement, abs=1e-4)


def test_models_of_different_tasks_are_no_ensemble(tmp_path: Path, plan: Plan) -> None:
    models = [_model(tmp_path / "a", plan), _model(tmp_path / "b", tiny_plan(TWO_CLASSES))]
    with pytest.raises(ModelError, match="classes or channels are not those of"):
        Predictor(models, CPU)


def test_models_that_treat_nan_differently_do_not_change_each_others_scan(tmp_path: Path) -> None:
    plans = [tiny_plan("data.nan=zero"), tiny_plan()]
    stack = blob()[0][None]
    stack[0, 0, 0, 0] = np.nan
    models = [_model(tmp_path / f"run-{k}", plan) for k, plan in enumerate(plans)]
    with pytest.raises(CaseError, match="NaN"):
        Predictor(models, CPU).segment(stack, _grid((24, 24, 16)), "x")


@pytest.mark.parametrize(
    ("shape", "scale", "said"),
    [((24, 24, 3), 1.0, "at least 4 voxels"), ((24, 24, 16), 1e-3, "no patient"), ((24, 24, 16), 100.0, "no patient")],
)
def test_a_grid_that_no_scan_has_is_refused_before_anything_is_computed(
    tmp_path: Path, plan: Plan, shape: tuple[int, int, int], scale: float, said: str
) -> None:
    grid = Geometry(shape, torch.from_numpy(OBLIQUE * [[scale], [scale], [scale], [1]]))
    with pytest.raises(CaseError, match=said):
        Predictor([_model(tmp_path, plan)], CPU).segment(np.zeros((1, *shape), np.float32), grid, "x")


def test_a_scan_that_takes_too_much_memory_is_refused_with_the_sizes(tmp_path: Path, plan: Plan) -> None:
    predictor, grid = Predictor([_model(tmp_path, plan)], CPU), _grid((24, 24, 16))
    with pytest.raises(CaseError, match=r"x: .* GB of memory, 0\.1 are allowed \(--memory-gb\)\. It has 24 x 24 x 16"):
        predictor.segment(blob()[0][None], grid, "x", memory_gb=0.1)
    assert predictor.segment(blob()[0][None], grid, "x", memory_gb=1).labels.shape == grid.shape


def test_an_ensemble_keeps_the_largest_component_of_a_connected_class(tmp_path: Path) -> None:
    models = {
        each: _model(tmp_path / each, tiny_plan(f"task.classes=[{{name: x, value: 1, connected: {each}}}]"), 3.0)
        for each in ("true", "false")
    }
    pieces = {}
    for connected, model in models.items():
        stack = blob((24, 24, 16))[0][None]
        found = Predictor([model, model], CPU).segment(stack, _grid((24, 24, 16)), "x").labels
        pieces[connected] = ndimage.label(found, np.ones((3, 3, 3)))[1]
    assert pieces["true"] == 1 < pieces["false"]


def test_maps_of_several_models_are_counted_in_the_memory(plan: Plan) -> None:
    grid = _grid((100, 100, 100))
    one, two = (needed_gb(grid, [plan] * count, True) - needed_gb(grid, [plan] * count, False) for count in (1, 2))
    assert one == pytest.approx(0.008)
    assert two == pytest.approx(0.016)
