"""A cold start at a site: prototypes from its own labeled scans prompt in the first rounds, then the teacher does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from client.labeling import Labeler
from client.report import SiteReport
from client.site import Site
from client.site_config import load_site_config
from semisam_core.contract import TRAIN_SCALARS
from semisam_core.evaluation import dice_of
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.pseudo_labels.fusion import PseudoLabel
from tests.conftest import blob, tiny_plan, write_nifti
from tests.semisam_core.generalists.fake import FakeGeneralist

MakeSite = Callable[..., Path]
COLD = "pseudo_labels.cold_start={until_round: 2, generalist: fake}"
LATER = ("training.rounds=5", "pseudo_labels.first_round=3", COLD)
UNLABELED = {"labeled": [], "validation": []}


def _train(path: Path, plan: Plan, round_number: int = 1, run: str = "run") -> SiteReport:
    weights = dict(new_specialist(plan).state_dict())
    return Site(load_site_config(path), plan, run, round_number).train(weights)


def _same(first: SiteReport, second: SiteReport) -> bool:
    assert first.weights is not None
    assert second.weights is not None
    return all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, PseudoLabel]]:
    """Return a list that collects (prompting prediction, pseudo-label) whenever the site makes a pseudo-label."""
    import client.labeling as module

    seen: list[tuple[torch.Tensor, PseudoLabel]] = []
    original = module.make_pseudo_label

    def spy(image: torch.Tensor, teacher: torch.Tensor, *others: object) -> PseudoLabel:
        label = original(image, teacher, *others)  # type: ignore[arg-type]
        seen.append((teacher, label))
        return label

    monkeypatch.setattr(module, "make_pseudo_label", spy)
    return seen


def test_prototypes_find_the_target_where_an_untrained_specialist_does_not(
    make_site: MakeSite, made: list[tuple[torch.Tensor, PseudoLabel]]
) -> None:
    path, truth = make_site(), torch.from_numpy(blob(seed=1)[1]) > 0  # the unlabeled case
    _train(path, tiny_plan(), run="warm")
    assert dice_of(made[-1][0][1] > 0.5, truth) < 0.5
    scalars = _train(path, tiny_plan(*LATER), run="cold").scalars
    assert scalars["accepted"] == 1
    assert set(scalars) <= set(TRAIN_SCALARS)
    rough, label = made[-1]
    assert dice_of(rough[1] > 0.5, truth) > 0.7
    assert dice_of(label.generalist[0] > 0.5, truth) > 0.9


def test_prototypes_prompt_through_the_cold_start_and_the_teacher_afterwards(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = make_site(), tiny_plan(*LATER, "pseudo_labels.refresh_every=2")
    events: list[str] = []
    rough, network = Labeler._prompted_by_prototypes, Labeler._predict

    def by_prototypes(self: Labeler, *given: object) -> Callable[..., torch.Tensor]:
        predict_by = rough(self, *given)  # type: ignore[arg-type]
        return lambda pair, room: events.append(f"prototypes {pair.scan.id}") or predict_by(pair, room)  # type: ignore[func-returns-value]

    monkeypatch.setattr(Labeler, "_prompted_by_prototypes", by_prototypes)
    monkeypatch.setattr(
        Labeler,
        "_predict",
        lambda self, net, pair, room: events.append(f"teacher {pair.scan.id}") or network(self, net, pair, room),
    )
    seen = []
    for number in (1, 2, 3, 4, 5):
        _train(path, plan, number)
        seen.append([event for event in events if event.endswith("case-1")])
        events.clear()
    assert seen == [["prototypes case-1"], [], ["teacher case-1"], [], ["teacher case-1"]]


def test_a_null_cold_start_changes_nothing(make_site: MakeSite) -> None:
    path = make_site()
    plain = _train(path, tiny_plan("pseudo_labels.first_round=2"), run="plain")
    null = _train(path, tiny_plan("pseudo_labels.first_round=2", "pseudo_labels.cold_start=null"), run="null")
    assert "loss.generalist" not in plain.scalars
    assert _same(plain, null)


def test_a_cold_round_asked_for_again_gives_the_same_weights(make_site: MakeSite) -> None:
    path, plan = make_site(), tiny_plan(*LATER)
    first = _train(path, plan)
    assert first.scalars["accepted"] == 1
    assert _same(first, _train(path, plan))
    assert _same(first, _train(path, plan, run="elsewhere"))


def test_labels_of_unlabeled_and_validation_scans_do_not_shape_prototypes(make_site: MakeSite, tmp_path: Path) -> None:
    path, plan = make_site(cases=4), tiny_plan(*LATER)
    before = _train(path, plan)
    labels = tmp_path / "data" / "alpha" / "labels"
    for name in ("case-1", "case-3"):
        write_nifti(labels / f"{name}.nii.gz", np.full((3, 3, 3), 77, np.uint8))
    write_nifti(labels / "case-2.nii.gz", 1 - blob()[1])
    assert _same(before, _train(path, plan, run="poisoned"))
    write_nifti(labels / "case-0.nii.gz", np.roll(blob(seed=0)[1], 6, 0))
    assert not _same(before, _train(path, plan, run="moved"))


def test_a_wholly_unlabeled_site_has_no_prototypes_and_logs_it(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture, made: list[tuple[torch.Tensor, PseudoLabel]]
) -> None:
    path, plan = make_site(data=UNLABELED), tiny_plan(*LATER)
    with caplog.at_level(logging.WARNING):
        scalars = _train(path, plan).scalars
    assert scalars["accepted"] == 0
    assert scalars["gated.empty"] == 3
    assert "loss.generalist" not in scalars
    assert any("no labeled scan to take prototypes from" in line for line in caplog.messages)
    assert all(float(prompted[1:].max()) == 0 for prompted, _ in made)


def test_at_an_unlabeled_site_a_cold_start_changes_nothing_from_first_round_on(make_site: MakeSite) -> None:
    eager = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
    path = make_site(data=UNLABELED)
    plain = _train(path, tiny_plan(*eager), run="plain")
    cold = _train(path, tiny_plan(COLD, *eager), run="cold")
    assert plain.scalars["accepted"] == 3
    assert _same(plain, cold)


def test_a_failing_encoder_costs_pseudo_labels_but_not_the_round(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeGeneralist, "feature_map", fail)
    with caplog.at_level(logging.WARNING):
        scalars = _train(make_site(), tiny_plan(*LATER)).scalars
    assert scalars["gated.empty"] == 1
    assert scalars["steps"] == 2
    assert any("gets no pseudo-label: out of memory" in line for line in caplog.messages)


def test_prototypes_and_features_are_neither_sent_nor_stored(make_site: MakeSite, tmp_path: Path) -> None:
    report = _train(make_site(), tiny_plan(*LATER))
    assert report.weights is not None
    assert set(report.weights) == set(new_specialist(tiny_plan()).state_dict())
    assert not [path for path in tmp_path.rglob("*") if "prototype" in path.name]
