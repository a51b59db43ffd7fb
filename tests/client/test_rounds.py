"""What a site's round starts from, what it sends and what it keeps: student, teacher, seed, accepted pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.site import Site, SiteReport, derive_seed
from client.site_config import load_site_config
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.store import PseudoLabelStore
from tests.conftest import tiny_plan

MakeSite = Callable[..., Path]
Weights = dict[str, torch.Tensor]
UNLABELED = {"labeled": [], "validation": []}
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
REFUSED = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=900.0")
# The teacher's weight in every step: a regularizer that acts from the first step on.
FELT = ("regularizer.weight=100", "regularizer.ramp_share=0", "teacher.start=site", "training.rounds=6")


def _start(plan: Plan, seed: int = 0) -> Weights:
    weights = dict(new_specialist(plan).state_dict())
    return {name: value + 0.01 * seed for name, value in weights.items()}


def _site(path: Path, plan: Plan, number: int, run: str = "run") -> Site:
    return Site(load_site_config(path), plan, run, number)


def _report(path: Path, plan: Plan, number: int, weights: Weights | None = None, run: str = "run") -> SiteReport:
    return _site(path, plan, number, run).train(weights or _start(plan))


def _train(path: Path, plan: Plan, number: int, weights: Weights | None = None, run: str = "run") -> Weights:
    sent = _report(path, plan, number, weights, run).weights
    assert sent is not None
    return sent


def _kept_teacher(path: Path, plan: Plan, before: int, run: str = "run") -> Weights:
    teacher = _site(path, plan, 1, run).state.load_teacher(before)
    assert teacher is not None
    return teacher


def _same(first: Weights, second: Weights) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_student_is_sent_and_its_moving_average_is_kept(make_site: MakeSite) -> None:
    plan = tiny_plan("training.rounds=3", "training.steps_per_round=1", "training.optimizer.learning_rate=0.01")
    path, start = make_site(), _start(plan)
    sent = _train(path, plan, 2, start)
    kept = _kept_teacher(path, plan, before=3)
    # Step t = 1 of the study: decay 1 - 1 / (t + 1) = 1/2, from a teacher that starts as the global specialist.
    assert not _same(sent, start)
    for name, weight in kept.items():
        torch.testing.assert_close(weight, (start[name] + sent[name]) / 2)


def test_every_round_and_every_site_draws_its_own_patches(make_site: MakeSite) -> None:
    # With a constant learning rate and no regularizer, rounds differ by their seed alone.
    plan = tiny_plan("training.optimizer.final_share=1", "regularizer.name=none", "pseudo_labels=null")
    alpha, beta = make_site("alpha"), make_site("beta")
    first, second = _train(alpha, plan, 1), _train(alpha, plan, 2)
    assert not _same(first, second)
    assert not _same(first, _train(beta, plan, 1))
    assert _same(first, _train(alpha, plan, 1, run="again"))


def test_seeds_depend_on_study_site_and_round_and_fit_31_bits() -> None:
    seeds = {derive_seed(s, site, number) for s in range(4) for site in ("a", "b", "a1") for number in range(1, 40)}
    assert len(seeds) == 4 * 3 * 39
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "alpha", 1) == derive_seed(0, "alpha", 1)


def test_a_site_that_sat_out_rounds_resumes_from_its_latest_teacher(make_site: MakeSite) -> None:
    plan, path = tiny_plan(*FELT), make_site()
    _train(path, plan, 1, _start(plan, seed=1))
    latest = _kept_teacher(path, plan, before=2)
    sat_out = _train(path, plan, 4)
    assert _same(sat_out, _train(path, plan, 4)), "asked for again"
    assert not _same(sat_out, _train(path, plan, 4, run="fresh"))
    _site(path, plan, 4, "copied").state.save_teacher(3, latest)
    assert _same(sat_out, _train(path, plan, 4, run="copied"))


def test_a_site_resumes_from_the_latest_of_several_teachers(make_site: MakeSite) -> None:
    plan, path = tiny_plan(*FELT), make_site()
    for number in (1, 2):
        _train(path, plan, number, _start(plan, seed=number))
    expected = _kept_teacher(path, plan, before=3)
    assert not _same(expected, _kept_teacher(path, plan, before=2))
    _site(path, plan, 4, "copied").state.save_teacher(3, expected)
    assert _same(_train(path, plan, 4), _train(path, plan, 4, run="copied"))


def test_an_earlier_round_asked_for_again_does_not_see_later_teachers(make_site: MakeSite) -> None:
    plan, path = tiny_plan(*FELT), make_site()
    answers = [_train(path, plan, number, _start(plan, seed=number)) for number in (1, 2, 4)]
    again = [_train(path, plan, number, _start(plan, seed=number)) for number in (4, 2, 1)]
    assert all(_same(first, second) for first, second in zip(answers, reversed(again), strict=True))


def test_a_site_without_a_kept_teacher_logs_it_after_the_first_round_only(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    plan, path = tiny_plan("teacher.start=site", "training.rounds=3"), make_site()
    _train(path, plan, 1)
    assert "teacher" not in caplog.text
    _train(path, plan, 3, run="fresh")
    assert "No teacher kept from before round 3: starting fresh" in caplog.text


@pytest.mark.parametrize("damage", ["torn", "other shapes", "not finite"])
def test_a_kept_teacher_that_cannot_be_used_is_logged_and_the_round_starts_fresh(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    plan, path = tiny_plan(*FELT), make_site()
    fresh = _train(path, plan, 2, run="fresh")
    caplog.clear()
    _train(path, plan, 1, _start(plan, seed=1))
    state, kept = _site(path, plan, 1).state, _kept_teacher(path, plan, before=2)
    if damage == "torn":
        file = state.folder / "teacher-00001.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "other shapes":
        state.save_teacher(1, {name: value[None] for name, value in kept.items()})
    else:
        state.save_teacher(1, {name: value * float("nan") for name, value in kept.items()})
    assert _same(fresh, _train(path, plan, 2))
    assert ("teacher-00001.safetensors cannot be read" if damage == "torn" else "kept teacher cannot be used") in (
        caplog.text
    )


def test_a_refused_pseudo_label_teaches_no_more_than_none(make_site: MakeSite) -> None:
    answers = {}
    for name, gates, changes in (
        ("accepted", EAGER, {}),
        ("refused", REFUSED, {}),
        ("none", EAGER, {"generalists": {}}),
    ):
        plan = tiny_plan("pseudo_labels.weight=100", *gates)
        report = _report(make_site(**changes), plan, 2, run=name)
        assert report.scalars["accepted"] == (name == "accepted")
        assert ("loss.generalist" in report.scalars) == (name == "accepted")
        assert report.weights is not None
        answers[name] = report.weights
    assert _same(answers["refused"], answers["none"])
    assert not _same(answers["accepted"], answers["none"])


def test_a_scan_that_nothing_teaches_from_is_not_trained_on(make_site: MakeSite) -> None:
    path = make_site(data=UNLABELED)
    for gates, steps in ((EAGER, 2), (REFUSED, 0)):
        report = _report(path, tiny_plan("regularizer.name=none", *gates), 1, run=f"steps-{steps}")
        assert report.scalars["steps"] == steps


def test_a_scan_of_which_one_class_is_accepted_is_trained_on(make_site: MakeSite) -> None:
    plan = tiny_plan(
        "task.classes=[{name: blob, value: 1}, {name: other, value: 2}]",
        "regularizer.name=none",
        "pseudo_labels.refresh_every=10",
        *EAGER,
    )
    path = make_site(data=UNLABELED)
    _train(path, plan, 1)
    store = PseudoLabelStore(_site(path, plan, 1).state.folder / "pseudo_labels")
    stored = sorted((_site(path, plan, 1).state.folder / "pseudo_labels").glob("*.safetensors"))
    for file in stored:
        label = store.load(file.stem)
        assert label is not None
        store.save(file.stem, replace(label, valid=torch.tensor([True, False]), refusals=(None, Refusal.EMPTY)))
    scalars = _report(path, plan, 2).scalars
    assert (scalars["accepted"], scalars["gated.empty"], scalars["steps"]) == (3, 3, 2)


def test_a_late_site_asked_for_its_first_round_again_gives_the_same_weights(make_site: MakeSite) -> None:
    plan, path = tiny_plan("training.rounds=6", "pseudo_labels.refresh_every=5", *EAGER), make_site()
    report = _report(path, plan, 3)  # no refresh round: the first answer makes pseudo-labels, the second reads them
    assert report.scalars["accepted"] == 1
    assert report.weights is not None
    assert _same(report.weights, _train(path, plan, 3))
