"""A study in generations: each begins with a new specialist, taught by the pseudo-labels of the one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client.app import app as client_app
from client.restore import RoundStart
from client.state import RunState
from engines.in_process_grid import run_in_process
from semisam_core.configuration import override, parse
from semisam_core.contract import initial_head, travelling
from semisam_core.errors import ConfigError
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.app import app as server_app
from tests.conftest import TINY_PLAN, tiny_plan

MakeSite = Callable[..., Path]
Weights = dict[str, torch.Tensor]
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
STILL = "training.optimizer.learning_rate=1e-12"
HEAD = ("pseudo_labels.method=evidence", "pseudo_labels.sources.feature_head={generalist: fake}")


def _plan(*changes: str) -> Plan:
    return tiny_plan("training.rounds=4", "training.generations=2", "pseudo_labels.first_round=2", *EAGER, *changes)


def _study(plan: Plan, site: Path, folder: Path) -> dict[int, Weights]:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": 1, "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)}], config)
    rounds = range(plan.training.rounds + 1)
    return {number: load_file(folder / "checkpoints" / f"round-{number:05d}.safetensors") for number in rounds}


def _close(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_a_generation_begins_with_another_specialist_of_the_plans_seed(make_site: MakeSite, tmp_path: Path) -> None:
    plan = _plan(STILL)
    found = _study(plan, make_site(), tmp_path / "run")
    first, second = (travelling(plan, new_specialist(_plan(STILL, f"seed={seed}"))) for seed in (0, 1))
    assert [_close(found[number], first) for number in range(5)] == [True, True, True, False, False]
    assert [_close(found[number], second) for number in (3, 4)] == [True, True]
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["round"], line["generation"]) for line in lines if line["event"] == "generation"] == [(3, 2)]


def test_it_is_taught_at_once_by_the_pseudo_labels_that_the_one_before_left(
    make_site: MakeSite, tmp_path: Path
) -> None:
    path = make_site(data={"labeled": [], "validation": []})
    _study(_plan(), path, tmp_path / "run")
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    taught = {line["round"]: "loss.generalist" in line for line in lines if line["event"] == "trained"}
    assert taught == {1: False, 2: True, 3: True, 4: True}
    assert [number for number in range(1, 5) if _plan().refreshes(number)] == [2, 4]
    always = _plan("pseudo_labels.first_round=1")
    assert [number for number in range(1, 5) if always.refreshes(number)] == [1, 2, 4]


def test_the_feature_head_goes_on(make_site: MakeSite, tmp_path: Path) -> None:
    plan = _plan(*HEAD)
    found = _study(plan, make_site(), tmp_path / "run")
    start = {name: value for name, value in initial_head(plan).items() if ".views." in name}
    moved = [max(float((found[number][name] - start[name]).abs().max()) for name in start) for number in range(5)]
    assert moved[0] == 0
    assert moved[3] > moved[1] > 0


def test_schedules_start_over() -> None:
    training = _plan().training
    assert [training.local_round(number) for number in range(1, 5)] == [1, 2, 1, 2]
    assert training.total_steps == 2 * training.steps_per_round
    one = tiny_plan("training.rounds=4").training
    assert [one.local_round(number) for number in range(1, 5)] == [1, 2, 3, 4]
    assert one.total_steps == 4 * one.steps_per_round


def test_what_a_site_kept_of_the_generation_before_is_not_used(tmp_path: Path) -> None:
    plan = _plan("teacher.start=site", "training.optimizer.state=kept")
    state, specialist = RunState(tmp_path, "run"), new_specialist(plan)
    kept = {name: torch.full_like(value, 7.0) for name, value in specialist.state_dict().items()}
    state.save_teacher(2, kept)
    for number, expected in ((2, False), (3, False), (4, False)):
        teacher = RoundStart(plan, state, number, torch.device("cpu")).teacher(specialist)
        assert bool((next(teacher.parameters()) == 7.0).all()) is expected
    state.save_teacher(3, kept)
    teacher = RoundStart(plan, state, 4, torch.device("cpu")).teacher(specialist)
    assert bool((next(teacher.parameters()) == 7.0).all())


def test_a_study_resumed_before_a_generation_ends_with_the_same_weights(make_site: MakeSite, tmp_path: Path) -> None:
    plan = _plan("aggregation.server_optimizer={name: momentum, learning_rate: 1.0}")
    plan = plan.model_copy(update={"pseudo_labels": None})
    path, folder = make_site(), tmp_path / "run"
    whole = _study(plan, path, folder)
    for later in (folder / "checkpoints").glob("*-0000[34]*"):
        later.unlink()
    again = _study(plan, path, folder)
    assert all(torch.equal(whole[4][name], again[4][name]) for name in whole[4])


def test_rounds_that_cannot_be_divided_are_refused() -> None:
    odd = override(TINY_PLAN, ["training.rounds=5", "training.generations=2"])
    with pytest.raises(ConfigError, match=r"rounds \(5\) cannot be divided into 2 equal generations"):
        parse(Plan, odd, "plan.yaml")


def test_one_generation_is_not_part_of_a_plans_hash() -> None:
    assert tiny_plan("training.generations=1").hash == tiny_plan().hash
    assert tiny_plan("training.generations=2").hash != tiny_plan().hash
