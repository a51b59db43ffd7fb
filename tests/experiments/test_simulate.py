"""The local baseline of a simulated study: the same study for one site, supervised."""

from __future__ import annotations

from experiments.simulate import supervised_alone
from tests.conftest import tiny_plan


def test_the_local_baseline_is_supervised_and_otherwise_the_same_study() -> None:
    plan = tiny_plan("aggregation.minimum_sites=2", "training.proximal=0.1", "seed=5")
    alone = supervised_alone(plan)
    assert (alone.regularizer.name, alone.pseudo_labels, alone.uses_unlabeled) == ("none", None, False)
    assert (alone.aggregation.minimum_sites, alone.training.proximal) == (1, 0.0)
    assert (alone.seed, alone.data, alone.specialist) == (plan.seed, plan.data, plan.specialist)
    assert alone.training.steps_per_round == plan.training.steps_per_round
    assert alone.training.rounds == plan.training.rounds
