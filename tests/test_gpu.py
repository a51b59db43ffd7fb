"""What claims to run on a GPU runs there, with the CPU's results up to rounding. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from client.app import app as client_app
from client.site import Site
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from semisam_core.evaluation import dice_of
from semisam_core.files import read_json_lines
from semisam_core.generalists import Prompts, Segmentation, SliceBox, VolumeGrid
from semisam_core.generalists.lite_medsam import LiteMedSAM
from semisam_core.inference import new_specialist, predict
from semisam_core.plan import Plan
from server.app import app as server_app
from tests.conftest import blob, tiny_plan

MakeSite = Callable[..., Path]
CPU, GPU = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch finds none on this machine")


def test_litemedsams_answers_in_half_precision_are_those_of_single_precision() -> None:
    image, label = blob((96, 96, 6), seed=1)
    volume, truth = torch.from_numpy(image), torch.from_numpy(label)
    grid, slices = VolumeGrid((96, 96, 6), (1.0, 1.0, 1.0)), (2, 3)
    boxes = []
    for index in slices:
        where = truth[:, :, index].nonzero()
        (top, left), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
        boxes.append(SliceBox(index, (top, left, bottom, right)))

    def answer(device: torch.device) -> Segmentation:
        model = LiteMedSAM.load(device)
        return model.segment(model.embed(volume, grid, slices), Prompts(boxes=tuple(boxes)), grid)

    exact, half = answer(CPU), answer(GPU)
    assert half.probability.device == CPU
    assert float(dice_of(exact.probability > 0.5, half.probability > 0.5)) > 0.98


def test_a_prediction_is_the_cpus(plan: Plan) -> None:
    network, image = new_specialist(plan), torch.from_numpy(blob(seed=2)[0])[None] / 100
    exact = predict(network, image, plan, CPU)
    found = predict(network.to(GPU), image, plan, GPU)
    assert found.device == CPU
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-2)


def _trained(path: Path, plan: Plan) -> dict[str, Tensor]:
    weights = Site(load_site_config(path), plan, "run", 1).train(dict(new_specialist(plan).state_dict())).weights
    assert weights is not None
    return weights


def test_a_round_of_training_ends_close_to_the_cpus(make_site: MakeSite, tmp_path: Path) -> None:
    plan = tiny_plan("pseudo_labels=null", "training.optimizer.name=sgd")
    exact = _trained(make_site(), plan)
    found = _trained(make_site(device="cuda", storage={"folder": str(tmp_path / "another")}), plan)
    for name, value in exact.items():
        assert found[name].device == CPU
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-2)


def test_a_private_round_trains(make_site: MakeSite) -> None:
    plan = tiny_plan("pseudo_labels=null", "privacy={noise_multiplier: 1.0, sampling_rate: 0.5}")
    found = _trained(make_site(device="cuda", privacy={"maximum_epsilon": 1000.0}), plan)
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("generalist", ["fake", "lite-medsam"])
def test_a_study_runs_to_its_end(make_site: MakeSite, tmp_path: Path, generalist: str) -> None:
    offered = {generalist: {"weights": "packaged"}}
    sites = [make_site("alpha", device="cuda", generalists=offered)]
    sites.append(make_site("beta", first_seed=10, device="cuda", generalists=offered, data={"labeled": []}))
    plan = tiny_plan(f"pseudo_labels.generalists=[{generalist}]", "pseudo_labels.prompting.slice_step_mm=4.0")
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": 2, "run-folder": str(tmp_path / "run")}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert not [line for line in lines if line["event"] == "refused"]
    assert any(line["accepted"] + line["gated"] > 0 for line in lines if line["event"] == "trained")
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "run" / "best.safetensors").values())
