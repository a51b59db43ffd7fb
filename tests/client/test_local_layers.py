"""Batch norm at sites: local layers never leave and are restored unchanged, shared ones are averaged like the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client.app import app as client_app
from client.restore import WeightsNotAgreedError
from client.site import Site
from client.site_config import load_site_config
from client.state import RunState
from engines.in_process_grid import run_in_process
from semisam_core.contract import disagreement, specialist_spec, travelling
from semisam_core.data.cases import Role
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.specialists import batch_norm_tensors
from server.app import app as server_app
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
Weights = dict[str, torch.Tensor]
ARGUMENTS = "{channels: [4, 8], strides: [2], residual_units: 0, normalization: batch}"


def _plan(statistics: str, *more: str) -> Plan:
    chosen = f"specialist={{name: unet, arguments: {ARGUMENTS}, statistics: {statistics}}}"
    return tiny_plan(chosen, "pseudo_labels=null", *more)


def _site(path: Path, plan: Plan, round_number: int, run: str = "run") -> Site:
    return Site(load_site_config(path), plan, run, round_number)


def _start(plan: Plan) -> Weights:
    return travelling(plan, new_specialist(plan))


def _train(path: Path, plan: Plan, round_number: int, weights: Weights | None = None, run: str = "run") -> Weights:
    sent = _site(path, plan, round_number, run).train(weights or _start(plan)).weights
    assert sent is not None
    return sent


def _kept(path: Path, plan: Plan, before: int) -> Weights:
    layers = _site(path, plan, 1).state.load_layers(before)
    assert layers is not None
    return layers


def _same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def sites(make_site: MakeSite) -> list[Path]:
    """Two hospitals with different scans."""
    return [make_site("alpha"), make_site("beta", first_seed=10)]


def test_local_statistics_differ_between_sites_and_are_not_sent(sites: list[Path]) -> None:
    plan = _plan("local")
    layers = batch_norm_tensors(new_specialist(plan))
    for path in sites:
        sent = _train(path, plan, 1)
        assert disagreement(sent, specialist_spec(plan)) is None
        assert not layers & set(sent)
    alpha, beta = (_kept(path, plan, 2) for path in sites)
    assert set(alpha) == set(beta) == layers
    assert all(not torch.equal(alpha[n], beta[n]) for n in layers if n.endswith(("running_mean", "running_var")))
    assert any(not torch.equal(alpha[n], beta[n]) for n in layers if n.endswith("weight"))


def test_local_layers_resume_from_the_sites_last_round(make_site: MakeSite) -> None:
    plan, path = _plan("local"), make_site()
    _train(path, plan, 1)
    resumed = _train(path, plan, 2)
    fresh = _train(path, plan, 2, run="fresh")
    assert not _same(resumed, fresh)
    per_round = 2 * plan.training.steps_per_round  # a labeled and an unlabeled pass a step
    counted = {int(value) for name, value in _kept(path, plan, 3).items() if name.endswith("num_batches_tracked")}
    assert counted == {2 * per_round}


def test_a_site_that_sat_out_rounds_resumes_from_its_latest_layers(make_site: MakeSite) -> None:
    plan, path = _plan("local", "training.rounds=5"), make_site()
    _train(path, plan, 1)
    late = _train(path, plan, 4)
    assert not _same(late, _train(path, plan, 4, run="fresh"))


def test_a_round_asked_for_again_starts_from_the_same_layers(make_site: MakeSite) -> None:
    plan, path = _plan("local", "teacher.start=site"), make_site()
    _train(path, plan, 1)
    second = _train(path, plan, 2)
    layers = _kept(path, plan, 3)
    assert _same(second, _train(path, plan, 2))
    assert _same(layers, _kept(path, plan, 3))


def test_a_kept_teacher_brings_its_own_layers(make_site: MakeSite) -> None:
    path, answers = make_site(), []
    for start in ("global", "site"):
        plan = _plan("local", f"teacher.start={start}", "regularizer.weight=100", "regularizer.ramp_share=0")
        _train(path, plan, 1, run=start)
        answers.append(_train(path, plan, 2, run=start))
    assert not _same(*answers)


def test_evaluation_uses_the_local_layers_of_the_sites_last_training(make_site: MakeSite) -> None:
    plan, path = _plan("local"), make_site(data={"validation": ["case-2"]})
    sent = _train(path, plan, 1)
    site = _site(path, plan, 1)
    site.evaluate(sent, final=False)
    (mine,) = read_json_lines(site.state.folder / "scores.jsonl")
    specialist = new_specialist(plan)
    specialist.load_state_dict({**sent, **_kept(path, plan, 2)}, strict=True)
    (case,) = site.scans.usable(Role.VALIDATION)
    expected = site._score(case, specialist)
    assert expected[0] is not None
    assert mine["dice"] == expected[0].dice
    other = _site(path, plan, 1, "elsewhere")
    other.evaluate(sent, final=False)
    (without,) = read_json_lines(other.state.folder / "scores.jsonl")
    assert without["dice"] != mine["dice"]


def test_layers_of_another_network_are_not_used(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    plan, path = _plan("local"), make_site()
    expected = _train(path, plan, 2, run="fresh")
    site = _site(path, plan, 2)
    site.state.save_layers(1, {"foreign": torch.zeros(1)})
    assert _same(expected, _train(path, plan, 2))
    assert "batch-norm layers cannot be used" in caplog.text


def test_a_site_refuses_local_layers_from_the_server(make_site: MakeSite) -> None:
    plan = _plan("local")
    with pytest.raises(WeightsNotAgreedError, match="10 are not agreed"):
        _site(make_site(), plan, 1).train(dict(new_specialist(plan).state_dict()))


def test_shared_layers_are_sent_and_none_are_kept(make_site: MakeSite) -> None:
    plan, path = _plan("shared"), make_site()
    sent = _train(path, plan, 1)
    assert disagreement(sent, specialist_spec(plan)) is None
    assert {value.dtype for value in sent.values()} == {torch.float32}
    assert all(float(value.abs().max()) > 0 for name, value in sent.items() if name.endswith("running_mean"))
    assert _site(path, plan, 1).state.load_layers(9) is None


def test_layers_of_the_last_three_rounds_are_kept(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (1, 2, 5, 6):
        state.save_layers(number, {"mean": torch.tensor([float(number)])})
    assert len(list(state.folder.glob("layers-*.safetensors"))) == 3
    found = [state.load_layers(before) for before in (7, 6, 4, 2)]
    assert [None if each is None else float(each["mean"]) for each in found] == [6, 5, 2, None]


def _study(plan: Plan, sites: list[Path], folder: Path) -> list[Weights]:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    names = [f"checkpoints/round-{number:05d}" for number in range(plan.training.rounds + 1)]
    return [load_file(folder / f"{name}.safetensors") for name in (*names, "best")]


def test_a_study_with_local_layers_publishes_a_specialist_without_them(sites: list[Path], tmp_path: Path) -> None:
    plan = _plan("local")
    for weights in _study(plan, sites, tmp_path / "run"):
        assert disagreement(weights, specialist_spec(plan)) is None
        assert not batch_norm_tensors(new_specialist(plan)) & set(weights)
    events = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert {line["site"] for line in events if line["event"] == "evaluated"} == {"alpha", "beta"}


def test_shared_statistics_are_averaged_and_keep_their_dtypes(sites: list[Path], tmp_path: Path) -> None:
    plan = _plan("shared", "training.rounds=1")
    first, combined, best = _study(plan, sites, tmp_path / "run")
    alone = [_train(path, plan, 1, first, run="alone") for path in sites]
    for name, value in combined.items():
        assert value.dtype == torch.float32
        expected = (alone[0][name].double() + alone[1][name].double()) / 2
        assert torch.allclose(value.double(), expected, atol=1e-6), name
    assert any(name.endswith("running_var") for name in combined)
    assert _same(best, combined)
