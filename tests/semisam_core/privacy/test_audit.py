"""The privacy audit's attacks, where the answer is known: they find what is there, and nothing where nothing is."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from semisam_core.inference import new_specialist
from semisam_core.privacy.accounting import Spending, epsilon_of

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))  # a folder of scripts
attacks: Any = importlib.import_module("privacy_attacks")
audit: Any = importlib.import_module("privacy_audit")
SMALL = "specialist.arguments={channels: [4, 8], strides: [2], residual_units: 0}"
ONE_STEP = (*audit.ONE_STEP, audit.SGD, SMALL)


def _population(models: int, patients: int, gap: float, seed: int = 0) -> tuple[Any, Any]:
    """Return losses that are lower by `gap` deviations for members, on patients of different difficulty."""
    random = np.random.default_rng(seed)
    members = random.random((models, patients)) < 0.5
    confidence = random.normal(0, 3, patients) + random.normal(0, 1, (models, patients)) + gap * members
    return np.log1p(np.exp(-confidence)), members


def test_an_overfit_model_gives_its_members_away() -> None:
    plan = audit.plan_of(*ONE_STEP, "training.steps_per_round=60", "training.optimizer.learning_rate=0.05")
    people = [audit.person(k) for k in range(6)]
    losses, members = [], np.zeros((4, 6), bool)
    for model, inside in enumerate(([0, 1, 2], [3, 4, 5], [0, 2, 4], [1, 3, 5])):
        members[model, inside] = True
        # Labels turned around, so that nothing but memory tells a member.
        turned = [audit.Person(each.id, each.image, 1 - each.label) for each in people]
        taught = audit.trained(plan, new_specialist(plan), [turned[k] for k in inside], 1, model)
        shown = [turned[k] if members[model, k] else people[k] for k in range(6)]
        losses.append(audit.loss_on(taught, shown))
    assert attacks.area_under_curve(attacks.loss_scores(np.array(losses)), members) > 0.95


@pytest.mark.parametrize("attack", ["loss", "lira"])
def test_models_that_learned_nothing_give_nobody_away(attack: str) -> None:
    areas, found, covered = [], [], 0
    for seed in range(20):
        losses, members = _population(20, 40, 0.0, seed)
        scores = attacks.loss_scores(losses) if attack == "loss" else attacks.likelihood_scores(losses, members)
        area = attacks.with_interval(attacks.area_under_curve, scores, members, seed, draws=100)
        areas.append(area.value)
        found.append(attacks.detected(scores, members, 0.05))
        covered += area.low <= 0.5 <= area.high
    assert abs(np.mean(areas) - 0.5) < 0.015
    assert np.mean(found) < 0.07
    assert covered >= 14  # of 20, 19 expected if patients were as many as models are independent


def test_the_likelihood_ratio_sees_members_that_the_loss_hides_behind_difficulty() -> None:
    losses, members = _population(40, 50, gap=2.0)
    by_loss = attacks.area_under_curve(attacks.loss_scores(losses), members)
    by_ratio = attacks.area_under_curve(attacks.likelihood_scores(losses, members), members)
    best = norm.cdf(2.0 / math.sqrt(2))  # with the difficulty known
    assert by_loss < 0.72
    assert best - 0.05 < by_ratio < best + 0.02


def test_a_target_is_no_shadow_model_of_itself() -> None:
    losses, members = _population(6, 20, gap=1.0)
    before = attacks.likelihood_scores(losses, members)[0]
    changed = losses.copy()
    changed[0] *= 0.5
    after = attacks.likelihood_scores(changed, members)[0]
    known = (~members[1:]).any(0)
    assert known.sum() > 10
    assert (after > before)[known].all()
    assert (after == 0)[~known].all()
    everywhere = np.ones_like(members)
    assert (attacks.likelihood_scores(losses, everywhere) == 0).all()


def test_the_area_and_the_rates_are_those_of_a_curve_worked_out_by_hand() -> None:
    scores = np.array([[5.0, 4.0, 4.0, 3.0, 2.0, 1.0]])
    members = np.array([[True, True, False, True, False, False]])
    assert attacks.area_under_curve(scores, members) == pytest.approx((3 + 2.5 + 2) / 9)
    assert attacks.detected(scores, members, 0.0) == pytest.approx(1 / 3)
    assert attacks.detected(scores, members, 0.34) == pytest.approx(1.0)
    assert attacks.advantage(6 - scores, members) == pytest.approx(2 / 3 - 1 / 3)


def _true_epsilon(deviation: float, delta: float) -> float:
    """Return the exact epsilon of one Gaussian mechanism of sensitivity 1 (Balle and Wang, ICML 2018)."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        a, b = 1 / (2 * deviation), middle * deviation
        spent = norm.cdf(a - b) - math.exp(middle) * norm.cdf(-a - b)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


@pytest.mark.parametrize("deviation", [0.5, 1.0, 3.0])
def test_the_bound_on_epsilon_exceeds_the_true_one_no_more_often_than_stated(deviation: float) -> None:
    truth, random, delta = _true_epsilon(deviation, 1e-5), np.random.default_rng(1), 1e-5
    bounds = [
        attacks.epsilon_bound(1 + deviation * random.normal(size=300), deviation * random.normal(size=300), delta, 0.9)
        for _ in range(60)
    ]
    assert sum(bound > truth for bound in bounds) <= 12  # of 60, 6 expected at most; 13 have a probability of 0.3 %
    assert deviation > 1 or np.median(bounds) > 0.15 * truth
    assert truth <= epsilon_of([Spending(deviation, 1.0, 1)], delta).value * 1.01


def test_the_bound_holds_at_its_edge() -> None:
    """Of randomised response with epsilon 1, where no threshold leaves room."""
    random, share = np.random.default_rng(3), math.e / (1 + math.e)
    bounds = [
        attacks.epsilon_bound(
            (random.random(400) < share).astype(float), (random.random(400) > share).astype(float), 0.0, 0.9
        )
        for _ in range(200)
    ]
    assert sum(bound > 1 for bound in bounds) <= 32  # of 200, 20 expected at most; more than 32 have 0.3 %
    assert np.median(bounds) > 0.5


def test_what_is_told_every_time_gives_the_largest_bound_and_what_is_not_told_none() -> None:
    most = attacks.largest_bound(400, 1e-5)
    assert most == pytest.approx(math.log(0.025 ** (1 / 200) / (1 - 0.025 ** (1 / 200))), rel=1e-3)
    same = np.zeros(400)
    assert attacks.epsilon_bound(same, same, 1e-5) == 0
    assert attacks.epsilon_bound(same + 2, same, 1e-5) == most


def test_a_secure_sum_gives_the_mean_and_shows_nothing_of_a_site() -> None:
    plan = audit.plan_of(*ONE_STEP, "aggregation.secure={}")
    start = new_specialist(plan)
    taught = [audit.trained(plan, start, [audit.person(k)], 1, k) for k in range(3)]
    updates = {name: each.state_dict() for name, each in zip(audit.SITES, taught, strict=True)}
    found, seen = audit.secure_mean(plan, start.state_dict(), updates)
    for name, value in audit.mean_of(taught).state_dict().items():
        assert torch.allclose(found[name], value, atol=1e-6)
    sent = audit.change(start.state_dict(), updates[audit.SITES[0]])
    flat = torch.cat([each.flatten() for each in sent])
    read = audit.masked_change(plan, start.state_dict(), updates[audit.SITES[0]], 0)
    assert [each.shape for each in read] == [each.shape for each in sent]
    assert abs(float(torch.cosine_similarity(torch.cat([each.flatten() for each in read]), flat, dim=0))) < 0.2
    assert len(seen) == 3


def test_an_update_of_one_patient_is_the_patients_gradient_and_inverting_it_shows_the_patient() -> None:
    plan = audit.plan_of(*ONE_STEP)
    start, victim = new_specialist(plan), audit.person(1)
    after = audit.trained(plan, start, [victim], 1, 0)
    update = audit.change(start.state_dict(), after.state_dict())
    truth = attacks.gradient_of(start, victim.image, victim.label)
    flat, own = (torch.cat([each.flatten() for each in parts]) for parts in (update, truth))
    assert float(torch.cosine_similarity(flat, own, dim=0)) > 0.999
    noise = [torch.randn(each.shape, generator=torch.Generator().manual_seed(0)) for each in truth]
    shown, nothing = (attacks.invert(start, victim.label, each, 60, 0) for each in (update, noise))
    assert attacks.likeness(shown, victim.image) > attacks.likeness(nothing, victim.image) + 0.2


def test_likeness_to_a_patient_beyond_what_everybody_looks_like() -> None:
    random = torch.Generator().manual_seed(0)
    common, own, other = (torch.randn((1, 1, 8, 8, 8), generator=random) for _ in range(3))
    assert attacks.own_likeness(3 * common + own, 5 + 2 * common + own, common) > 0.99
    assert abs(attacks.own_likeness(3 * common + own, 3 * common + other, common)) < 0.2
    assert attacks.likeness(3 * common + own, 3 * common + other) > 0.8
