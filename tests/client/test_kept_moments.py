"""An optimizer whose moments stay at the site between rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client.app import app as client_app
from client.site import Site
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from semisam_core.contract import disagreement, specialist_spec
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.app import app as server_app
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
Weights = dict[str, torch.Tensor]


def _plan(state: str, *more: str) -> Plan:
    return tiny_plan(f"training.optimizer.state={state}", "pseudo_labels=null", *more)


def _site(path: Path, plan: Plan, number: int, run: str = "run") -> Site:
    return Site(load_site_config(path), plan, run, number)


def _train(path: Path, plan: Plan, number: int, run: str = "run") -> Weights:
    sent = _site(path, plan, number, run).train(dict(new_specialist(plan).state_dict())).weights
    assert sent is not None
    assert disagreement(sent, specialist_spec(plan)) is None
    return sent


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_second_round_continues_from_the_firsts_moments(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan("kept")
    _train(path, plan, 1)
    kept = _site(path, plan, 1).state.load_moments(2)
    assert kept is not None
    steps = {int(value) for name, value in kept.items() if name.endswith(".step")}
    assert steps == {plan.training.steps_per_round}
    assert not _same(_train(path, plan, 2), _train(path, plan, 2, run="fresh"))


def test_the_first_round_is_that_of_moments_that_are_reset(make_site: MakeSite) -> None:
    path = make_site()
    assert _same(_train(path, _plan("kept"), 1), _train(path, _plan("reset"), 1, run="other"))


def test_reset_moments_are_not_written(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan("reset")
    _train(path, plan, 1)
    assert _site(path, plan, 2).state.load_moments(2) is None


def test_a_round_asked_for_again_starts_from_the_same_moments(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan("kept")
    _train(path, plan, 1)
    assert _same(_train(path, plan, 2), _train(path, plan, 2))


def test_moments_of_another_optimizer_are_not_used(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    path, plan = make_site(), _plan("kept")
    expected = _train(path, plan, 2, run="fresh")
    _train(path, _plan("kept", "training.optimizer.name=sgd"), 1)
    assert _same(_train(path, plan, 2), expected)
    assert "optimizer moments cannot be used" in caplog.text


@pytest.mark.parametrize("state", ["kept", "reset"])
def test_a_study_resumed_after_its_first_round_ends_with_the_weights_of_one_that_was_not_stopped(
    make_site: MakeSite, tmp_path: Path, state: str
) -> None:
    sites = [make_site("alpha"), make_site("beta", first_seed=10, data={"labeled": []})]
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(_plan(state, "training.rounds=3").model_dump(mode="json")))

    def run(folder: Path) -> Weights:
        config: dict[str, str | int] = {"plan": str(plan), "num-sites": 2, "run-folder": str(folder)}
        run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
        return load_file(folder / "best.safetensors")

    folder = tmp_path / "run"
    whole = run(folder)
    for later in [*(folder / "checkpoints").glob("round-0000[23]*"), folder / "best.safetensors"]:
        later.unlink()
    assert _same(run(folder), whole)
    assert [line["round"] for line in read_json_lines(folder / "metrics.jsonl") if line["event"] == "resumed"] == [1]
