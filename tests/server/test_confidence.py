"""Confidence in pseudo-labels decides a site's weight: from the generalist's output to the server's mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from client.app import app as client_app
from client.site import Site
from client.site_config import load_site_config
from engines.in_process_grid import run_in_process
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.app import app as server_app
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
WEIGHTED = ("aggregation.weights=confidence", "aggregation.unlabeled_share=0.5", *EAGER)


def _run(plan: Plan, sites: list[Path], folder: Path) -> list[dict[str, object]]:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    return read_json_lines(folder / "metrics.jsonl")


def _train(path: Path, plan: Plan) -> Mapping[str, float]:
    return Site(load_site_config(path), plan, "run", 1).train(dict(new_specialist(plan).state_dict())).scalars


def test_a_site_sends_the_mean_confidence_of_what_it_accepted(make_site: MakeSite) -> None:
    scalars = _train(make_site(), tiny_plan(*WEIGHTED))
    assert scalars["accepted"] == 1
    assert 0 < scalars["confidence"] < 1


def test_a_site_that_accepted_nothing_has_no_confidence(make_site: MakeSite) -> None:
    scalars = _train(make_site(), tiny_plan("pseudo_labels.gates.minimum_volume_ml=900.0"))
    assert (scalars["accepted"], scalars["confidence"]) == (0, 0.0)


def test_a_site_without_generalists_has_no_confidence(make_site: MakeSite) -> None:
    scalars = _train(make_site(generalists={}), tiny_plan())
    assert (scalars["accepted"], scalars["confidence"]) == (0, 0.0)


def test_a_higher_uncertainty_weight_gives_less_confidence(make_site: MakeSite) -> None:
    path = make_site()
    trusting, doubting = (
        _train(path, tiny_plan(*WEIGHTED, f"pseudo_labels.uncertainty.specialist={weight}"))["confidence"]
        for weight in (1.0, 40.0)
    )
    assert doubting < trusting


def test_the_study_weights_sites_by_the_scalars_they_sent(make_site: MakeSite, tmp_path: Path) -> None:
    plan = tiny_plan(*WEIGHTED)
    sites = [
        make_site("alpha", data={"labeled": ["case-0", "case-1"]}),
        make_site("gamma", first_seed=20, data={"labeled": [], "validation": []}),
    ]
    lines = _run(plan, sites, tmp_path / "run")
    for number in (1, 2):
        trained = {line["site"]: line for line in lines if line["event"] == "trained" and line["round"] == number}
        (combined,) = [line for line in lines if line["event"] == "aggregated" and line["round"] == number]
        ramp = math.exp(-5 * (1 - number / 2) ** 2)
        raw = {
            site: float(str(line["labeled"]))
            + 0.5 * ramp * float(str(line["accepted"])) * float(str(line["confidence"]))
            for site, line in trained.items()
        }
        assert raw["gamma"] > 0
        assert combined["weights"] == pytest.approx({site: value / sum(raw.values()) for site, value in raw.items()})


def test_an_unlabeled_site_unsure_of_all_it_accepted_has_next_to_no_weight(make_site: MakeSite, tmp_path: Path) -> None:
    plan = tiny_plan(*WEIGHTED, "pseudo_labels.uncertainty.specialist=1000000.0", "training.rounds=1")
    sites = [make_site("alpha"), make_site("gamma", first_seed=20, data={"labeled": [], "validation": []})]
    lines = _run(plan, sites, tmp_path / "run")
    (unsure,) = [line for line in lines if line["event"] == "trained" and line["site"] == "gamma"]
    (combined,) = [line for line in lines if line["event"] == "aggregated"]
    assert unsure["accepted"] == 3
    assert isinstance(combined["weights"], dict)
    assert combined["weights"]["gamma"] < 0.01
