"""The federated feature head: trained where there are labels, averaged, used where there are none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from client.app import app as client_app
from client.restore import WeightsNotAgreedError
from client.site import Site
from client.site_config import inventory, load_site_config
from engines.in_process_grid import run_in_process
from semisam_core.contract import HEAD_PREFIX, TRAIN_SCALARS, disagreement, initial_head, specialist_spec, update_spec
from semisam_core.data.cases import Role
from semisam_core.data.scans import load_scan
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.sources.base import Source
from semisam_core.sources.generalists import PromptedGeneralists
from semisam_core.sources.labeling import EvidenceLabeler
from server.app import app as server_app
from tests.conftest import tiny_plan, write_balls, write_site

MakeSite = Callable[..., Path]
Weights = dict[str, torch.Tensor]
UNLABELED: dict[str, list[str]] = {"labeled": [], "validation": []}
HEAD = "pseudo_labels.sources.feature_head={generalist: fake, steps_per_round: 30, learning_rate: 0.01}"


def _plan(*changes: str) -> Plan:
    return tiny_plan("pseudo_labels.method=evidence", HEAD, "pseudo_labels.gates.minimum_volume_ml=0.0", *changes)


def _start(plan: Plan) -> Weights:
    return dict(new_specialist(plan).state_dict()) | initial_head(plan)


def _head(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name.startswith(HEAD_PREFIX)}


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _train(path: Path, plan: Plan, run: str = "run") -> tuple[Weights, dict[str, float | int]]:
    report = Site(load_site_config(path), plan, run, 1).train(_start(plan))
    assert report.weights is not None
    assert disagreement(report.weights, update_spec(plan)) is None
    assert set(report.scalars) <= set(TRAIN_SCALARS)
    return report.weights, dict(report.scalars)


def test_a_site_with_labels_trains_the_head_and_sends_it(make_site: MakeSite) -> None:
    plan = _plan()
    sent, scalars = _train(make_site(), plan)
    assert scalars["head_steps"] == 30
    assert all(not torch.equal(value, initial_head(plan)[name]) for name, value in _head(sent).items())


def test_after_its_rounds_the_head_is_sent_back_as_it_came(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan()
    for rounds, steps in (("1", 30), ("null", 30)):
        limited = _plan(f"{HEAD[:-1]}, rounds: {rounds}}}")
        assert _train(path, limited, f"run-{rounds}")[1]["head_steps"] == steps
    late = _plan(f"{HEAD[:-1]}, rounds: 1}}")
    report = Site(load_site_config(path), late, "late", 2).train(_start(plan))
    assert report.scalars["head_steps"] == 0
    assert report.weights is not None
    assert _same(_head(dict(report.weights)), initial_head(plan))


def test_the_head_carries_the_mean_volume_of_the_labels_it_was_trained_on(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan()
    sent, _ = _train(path, plan)
    config = load_site_config(path)
    voxels = [
        int((load_scan(case, plan.as_generalists_see, config.storage.folder / "prepared").label == 1).sum())
        for case in inventory(config, plan).of(Role.LABELED)
    ]
    mean_ml = math.prod(plan.as_generalists_see.data.spacing_mm) / 1000 * sum(voxels) / len(voxels)
    assert mean_ml > 0
    assert float(sent[f"{HEAD_PREFIX}log_volumes"][0].expm1()) == pytest.approx(mean_ml, rel=1e-4)


@pytest.mark.parametrize(("minimum", "leaves"), [(1, True), (2, False)])
def test_the_mean_volume_of_too_few_patients_stays_and_that_of_enough_leaves_rounded(
    make_site: MakeSite, minimum: int, leaves: bool
) -> None:
    plan = _plan()
    exact, _ = _train(make_site(), plan)
    path = make_site(egress={"numbers": "rounded", "minimum_patients": minimum, "significant_digits": 1})
    sent, scalars = _train(path, plan, "careful")
    assert scalars["head_steps"] == 30
    name = f"{HEAD_PREFIX}log_volumes"
    whole = float(exact[name][0].expm1())
    expected = float(f"{whole:.1g}") if leaves else 0.0
    assert float(sent[name][0].expm1()) == pytest.approx(expected, abs=1e-4)
    assert abs(expected - whole) > 1e-3


def test_a_site_without_labels_is_told_the_volume_of_the_others(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[float | None]] = []

    class Recording(EvidenceLabeler):
        def __init__(
            self,
            sources: Sequence[Source],
            generalists: PromptedGeneralists | None,
            plan: Plan,
            reliability: Mapping[str, Tensor] | None = None,
            calibration: Calibration | None = None,
            volumes_ml: Sequence[float | None] = (),
        ) -> None:
            told.append(list(volumes_ml))
            super().__init__(sources, generalists, plan, reliability, calibration, volumes_ml)

    monkeypatch.setattr("client.evidence.EvidenceLabeler", Recording)
    plan = _plan("pseudo_labels.first_round=1")
    for volume in (0.0, 1.5):
        weights = _start(plan) | {f"{HEAD_PREFIX}log_volumes": torch.full((1,), volume).log1p()}
        Site(load_site_config(make_site(f"site-{volume:g}"[:6], data=UNLABELED)), plan, "run", 1).train(weights)
    assert told == [[None], [pytest.approx(1.5)]]


@pytest.mark.parametrize(
    "changes",
    [{"data": UNLABELED}, {"egress": {"feature_head": False}}, {"generalists": {}}],
    ids=["no labels", "not allowed", "no generalist"],
)
def test_a_site_that_does_not_train_the_head_sends_it_back(make_site: MakeSite, changes: dict[str, object]) -> None:
    plan = _plan("pseudo_labels.prompting.threshold=0.3")
    sent, scalars = _train(make_site(**changes), plan)
    assert scalars["head_steps"] == 0
    assert _same(_head(sent), initial_head(plan))


def test_labels_of_some_classes_do_not_train_the_head(tmp_path: Path) -> None:
    classes = "task.classes=[{name: large, value: 1}, {name: next, value: 2}, {name: small, value: 3}]"
    write_balls(tmp_path / "data" / "alpha", 3, marked=(1,))
    path = write_site(tmp_path, "alpha", data={"labeled_classes": ["large"]})
    assert _train(path, _plan(classes))[1]["head_steps"] == 0


def test_training_that_fails_leaves_the_head_as_it_was_sent(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    factors = iter([1.0, 1.0])  # finite for two steps, so that the head has changed when training fails

    def loss(logits: Tensor, *_: Tensor) -> Tensor:
        return logits.sum() * next(factors, torch.nan)

    monkeypatch.setattr("semisam_core.sources.feature_head.head_loss", loss)
    plan = _plan()
    sent, scalars = _train(make_site(), plan)
    assert scalars["head_steps"] == 0
    assert _same(_head(sent), initial_head(plan))
    assert "feature head was not trained" in caplog.text


def test_a_round_asked_for_again_sends_the_same_head(make_site: MakeSite) -> None:
    path, plan = make_site(), _plan()
    assert _same(_train(path, plan)[0], _train(path, plan)[0])


@pytest.mark.parametrize("change", ["without", "with"])
def test_a_head_that_is_not_the_plans_is_refused(make_site: MakeSite, change: str) -> None:
    plan = _plan() if change == "without" else tiny_plan()
    weights = dict(new_specialist(plan).state_dict()) | (initial_head(_plan()) if change == "with" else {})
    with pytest.raises(WeightsNotAgreedError):
        Site(load_site_config(make_site()), plan, "run", 1).train(weights)


def _study(plan: Plan, sites: list[Path], folder: Path) -> list[Weights]:
    path = folder.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    config: dict[str, str | int] = {"plan": str(path), "num-sites": len(sites), "run-folder": str(folder)}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    names = [f"checkpoints/round-{number:05d}" for number in range(plan.training.rounds + 1)]
    return [load_file(folder / f"{name}.safetensors") for name in (*names, "best")]


def test_a_site_without_labels_is_helped_by_the_head_of_the_others_and_the_result_lacks_it(
    make_site: MakeSite, tmp_path: Path
) -> None:
    plan = _plan()
    labeled, unlabeled = make_site("alpha"), make_site("beta", first_seed=10, data=UNLABELED)
    start, first, last, best = _study(plan, [labeled, unlabeled], tmp_path / "run")
    alone, _ = _train(labeled, plan, "alone")
    assert _same(_head(start), initial_head(plan))
    assert all(torch.allclose(value, _head(alone)[name], atol=1e-6) for name, value in _head(first).items())
    assert not _same(_head(first), _head(last))
    assert disagreement(best, specialist_spec(plan)) is None
    run = next((load_site_config(unlabeled).storage.folder / "runs").iterdir())
    lines = [line for line in read_json_lines(run / "evidence.jsonl") if line["case"] == "case-1"]
    assert lines[-1]["weights"]["feature-head"] > 0
    assert lines[-1]["refused"] is None


def test_a_study_resumed_after_its_first_round_ends_with_the_same_head(make_site: MakeSite, tmp_path: Path) -> None:
    plan, sites = _plan(), [make_site("alpha"), make_site("beta", first_seed=10, data=UNLABELED)]
    whole = _study(plan, sites, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "round-00002.safetensors").unlink()
    assert _same(_study(plan, sites, tmp_path / "run")[-2], whole[-2])
