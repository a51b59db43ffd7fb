"""A new aggregation rule is one module and one line in the registry; plans, sites and server then know it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from client.app import app as client_app
from engines.in_process_grid import run_in_process
from semisam_core import aggregation
from semisam_core.aggregation import RULES, AggregationRule, RuleSettings, Update
from semisam_core.aggregation.coordinates import by_coordinate
from semisam_core.files import read_json_lines
from server.app import app as server_app
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
SEEN: list[list[dict[str, Tensor]]] = []


def _largest(updates: Sequence[Update], votes: Sequence[float], settings: RuleSettings) -> dict[str, Tensor]:
    SEEN.append([{name: update.tensor(name) for name in update.names} for update in updates])
    return by_coordinate(updates, lambda block: block.max(axis=0))


RULE = AggregationRule("largest", combine=_largest, least_updates=lambda settings: 2)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    monkeypatch.setitem(RULES, RULE.name, RULE)


@pytest.mark.usefixtures("registered")
def test_a_registered_rule_combines_the_updates_of_a_whole_study(make_site: MakeSite, tmp_path: Path) -> None:
    plan = tiny_plan("aggregation.rule=largest", "aggregation.minimum_sites=2")
    sites = [make_site("alpha", data={"labeled": ["case-0", "case-1"]}), make_site("beta", first_seed=10)]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": 2, "run-folder": str(tmp_path / "run")}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    assert [len(updates) for updates in SEEN] == [2, 2]
    for number, updates in enumerate(SEEN, start=1):
        found = load_file(tmp_path / "run" / "checkpoints" / f"round-{number:05d}.safetensors")
        assert all(
            torch.equal(value, torch.stack([each[name] for each in updates]).amax(0)) for name, value in found.items()
        )
        assert not all(torch.equal(value, updates[0][name]) for name, value in found.items())
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    weights = [line["weights"] for line in lines if line["event"] == "aggregated"]
    assert all(each == pytest.approx({"alpha": 0.5, "beta": 0.5}, abs=0.2) for each in weights)


@pytest.mark.usefixtures("registered")
def test_a_registered_rules_needs_are_checked_when_a_plan_is_read() -> None:
    with pytest.raises(ValidationError, match="the rule largest needs the updates of 2 sites"):
        tiny_plan("aggregation.rule=largest", "aggregation.minimum_sites=1")
    assert tiny_plan("aggregation.rule=largest", "aggregation.minimum_sites=2").aggregation.tolerated_sites == 0


def test_an_unknown_rule_is_refused_with_the_accepted_names() -> None:
    accepted = "weighted-mean, median, trimmed-mean, krum, multi-krum"
    with pytest.raises(ValidationError, match=f"no aggregation rule 'largest'; accepted: {accepted}"):
        tiny_plan("aggregation.rule=largest", "aggregation.minimum_sites=2")


def test_every_module_with_a_rule_is_registered_under_the_rules_name() -> None:
    modules = [
        import_module(f"{aggregation.__name__}.{each.name}") for each in pkgutil.iter_modules(aggregation.__path__)
    ]
    defined = {module.RULE.name: module.RULE for module in modules if hasattr(module, "RULE")}
    assert defined == RULES
