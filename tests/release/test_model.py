"""Loading a trained specialist: whole, of its own plan, by tensors alone; everything else is refused in a sentence."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from client.restore import local_layers
from release.model import ModelError, load_model
from semisam_core.contract import initial_head, update_spec, weights_sha256
from semisam_core.files import save_tensors
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan, write_plan
from server.run_folder import RunFolder
from tests.conftest import tiny_plan
from tests.release.runs import sharp_weights, write_run

HEAD = (
    "pseudo_labels.method=evidence",
    "pseudo_labels.sources={feature_head: {generalist: lite-medsam}}",
    "pseudo_labels.generalists=[lite-medsam]",
)
BATCH = "specialist.arguments={channels: [4, 8], strides: [2], residual_units: 0, normalization: batch}"


def test_a_run_folder_gives_its_selected_specialist(tmp_path: Path, plan: Plan) -> None:
    weights = sharp_weights(plan)
    model = load_model(write_run(tmp_path / "run", plan, weights))
    assert model.plan == plan
    assert model.round == 2
    assert model.sha256 == weights_sha256(weights)
    assert not model.specialist.training
    state = model.specialist.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_one_checkpoint_of_a_run_is_a_model_without_the_feature_head_beside_it(tmp_path: Path) -> None:
    plan = tiny_plan(*HEAD)
    head = initial_head(plan)
    assert head
    run, weights = RunFolder(tmp_path), sharp_weights(plan)
    write_plan(tmp_path / "plan.yaml", plan)
    assert set(weights | head) == set(update_spec(plan))
    run.save_round(1, weights | head, plan)
    model = load_model(tmp_path / "checkpoints" / "round-00001.safetensors")
    assert model.sha256 == weights_sha256(weights)
    assert model.round == 1


def test_an_exported_package_is_a_model(tmp_path: Path, plan: Plan) -> None:
    weights = sharp_weights(plan)
    save_tensors(tmp_path / "models" / "model.safetensors", weights, {"plan": plan.hash})
    write_plan(tmp_path / "extra" / "plan.yaml", plan)
    assert load_model(tmp_path).sha256 == weights_sha256(weights)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run, plan: (run / "best.safetensors").unlink(), "no best.safetensors yet"),
        (lambda run, plan: (run / "plan.yaml").unlink(), "no model is here"),
        (lambda run, plan: (run / "best.safetensors").write_bytes(pickle.dumps({"w": 1})), "cannot be read"),
        (lambda run, plan: _flip_a_weight(run / "best.safetensors"), "damaged"),
        (lambda run, plan: write_plan(run / "plan.yaml", tiny_plan("seed=1")), "another plan"),
        (
            lambda run, plan: write_plan(run / "plan.yaml", tiny_plan("specialist.arguments.channels=[8, 8]")),
            "does not fit",
        ),
        (lambda run, plan: write_run(run, plan, sharp_weights(plan, float("nan"))), "not finite"),
    ],
)
def test_what_is_no_whole_model_of_its_plan_is_refused(tmp_path: Path, plan: Plan, break_it: object, said: str) -> None:
    run = write_run(tmp_path / "run", plan)
    assert callable(break_it)
    break_it(run, plan)
    with pytest.raises(ModelError, match=said):
        load_model(run)


def test_a_checkpoint_without_its_plan_is_refused(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a" / "b" / "best.safetensors"
    save_tensors(path, sharp_weights(plan))
    with pytest.raises(ModelError, match=r"no plan\.yaml beside it"):
        load_model(path)


def test_local_batch_norm_is_said_to_be_missing_and_taken_from_a_site(tmp_path: Path) -> None:
    plan = tiny_plan(BATCH, "specialist.statistics=local")
    run = write_run(tmp_path / "run", plan)
    with pytest.raises(ModelError, match=r"batch-norm layers .* were never shared"):
        load_model(run)
    own = {name: torch.full_like(value, 3) for name, value in local_layers(plan, new_specialist(plan)).items()}
    save_tensors(tmp_path / "layers-00002.safetensors", own)
    model = load_model(run, tmp_path / "layers-00002.safetensors")
    state = model.specialist.state_dict()
    assert own
    assert all(torch.equal(state[name], value) for name, value in own.items())
    assert model.sha256 != load_model(run, _with(tmp_path, own, 4)).sha256  # another site's is another model


def test_layers_that_do_not_fit_are_refused(tmp_path: Path, plan: Plan) -> None:
    local = tiny_plan(BATCH, "specialist.statistics=local")
    own = local_layers(local, new_specialist(local))
    own.pop(next(iter(own)))
    with pytest.raises(ModelError, match="does not hold the batch-norm layers"):
        load_model(write_run(tmp_path / "local", local), _with(tmp_path, own, 1))
    with pytest.raises(ModelError, match="needs no layers"):
        load_model(write_run(tmp_path / "whole", plan), _with(tmp_path, own, 1))


def _with(folder: Path, layers: dict[str, torch.Tensor], value: int) -> Path:
    path = folder / f"layers-{value:05d}.safetensors"
    save_tensors(path, {name: torch.full_like(tensor, value) for name, tensor in layers.items()})
    return path


def _flip_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
