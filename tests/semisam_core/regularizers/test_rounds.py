"""Every regularizer at a real site over several rounds: what is sent, what is kept, what a repeated round gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.report import SiteReport
from client.site import Site
from client.site_config import load_site_config
from client.state import RunState
from semisam_core.contract import TRAIN_SCALARS, disagreement, specialist_spec
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.regularizers import REGULARIZERS
from semisam_core.training import LocalRound, new_regularizer, new_teacher, train_round
from tests.semisam_core.regularizers.steps import CPU, NAMES, WITH_NETWORKS, noise, plan_of
from tests.semisam_core.test_training import _labeled, _unlabeled

MakeSite = Callable[..., Path]
UNLABELED = {"labeled": [], "validation": []}
# Prompt with anything the untrained specialist predicts, so that pseudo-labels are accepted.
EAGER = ("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
State = dict[str, Tensor]


def _site(path: Path, plan: Plan, number: int, run: str) -> Site:
    return Site(load_site_config(path), plan, run, number)


def _train(path: Path, plan: Plan, weights: State, number: int, run: str = "run") -> tuple[State, SiteReport]:
    report = _site(path, plan, number, run).train(weights)
    assert report.weights is not None
    return report.weights, report


def _rounds(path: Path, plan: Plan, count: int = 2, run: str = "run") -> Iterator[tuple[State, SiteReport]]:
    weights: State = dict(new_specialist(plan).state_dict())
    for number in range(1, count + 1):
        weights, report = _train(path, plan, weights, number, run)
        yield weights, report


def _same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _kept(path: Path, run: str = "run") -> list[Path]:
    return sorted((load_site_config(path).storage.folder / "runs" / run).glob("networks-*"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", [{}, UNLABELED], ids=["labeled", "unlabeled"])
def test_two_rounds_send_the_agreed_tensors_and_scalars_and_nothing_else(
    make_site: MakeSite, name: str, data: dict[str, list[str]]
) -> None:
    plan = plan_of(name, *EAGER)
    for weights, report in _rounds(make_site(data=data), plan):
        assert disagreement(weights, specialist_spec(plan)) is None
        assert set(report.scalars) <= set(TRAIN_SCALARS)
        assert report.scalars["steps"] == plan.training.steps_per_round
        assert "loss.generalist" in report.scalars
        assert ("loss.supervised" in report.scalars) == (not data)
        assert ("loss.consistency" in report.scalars) == (not REGULARIZERS[name].needs_labels or not data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", [{}, UNLABELED], ids=["labeled", "unlabeled"])
def test_a_round_asked_for_again_gives_the_same_weights(
    make_site: MakeSite, name: str, data: dict[str, list[str]]
) -> None:
    plan, path = plan_of(name, *EAGER), make_site(data=data)
    (first, _), (second, _) = _rounds(path, plan)
    assert not _same(first, second)
    assert _same(second, _train(path, plan, first, 2)[0])
    again, _ = _train(path, plan, dict(new_specialist(plan).state_dict()), 1)
    assert _same(first, again)
    assert _same(second, _train(path, plan, again, 2)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_regularizer_changes_the_specialist(name: str) -> None:
    def trained(regularizer: str) -> State:
        plan = plan_of(regularizer, "regularizer.ramp_share=0.0")
        specialist = new_specialist(plan)
        train_round(LocalRound(plan, specialist, new_teacher(specialist), [_labeled()], [_unlabeled()], 1, 0, CPU))
        return specialist.state_dict()

    assert not _same(trained(name), trained("none"))


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_auxiliary_networks_are_trained_and_kept_at_the_site(make_site: MakeSite, name: str) -> None:
    plan, path = plan_of(name), make_site()
    list(_rounds(path, plan))
    assert [file.stem for file in _kept(path)] == ["networks-00001", "networks-00002"]
    fresh = new_regularizer(plan, CPU)
    assert fresh is not None
    assert fresh.auxiliary is not None
    state = RunState(load_site_config(path).storage.folder, "run")
    first, second = state.load_networks(before=2), state.load_networks(before=3)
    assert first is not None
    assert second is not None
    assert first.keys() == fresh.auxiliary.state().keys()
    for name_of_tensor, initial in fresh.auxiliary.state().items():
        assert not torch.equal(initial, first[name_of_tensor])
        assert not torch.equal(first[name_of_tensor], second[name_of_tensor])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_NETWORKS])
def test_a_regularizer_without_networks_keeps_none(make_site: MakeSite, name: str) -> None:
    path = make_site()
    list(_rounds(path, plan_of(name), count=1))
    assert _kept(path) == []


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_a_round_resumes_from_the_networks_of_the_last(make_site: MakeSite, name: str) -> None:
    plan, path = plan_of(name), make_site()
    (first, _), (second, _) = _rounds(path, plan)
    _kept(path)[0].unlink()
    assert not _same(second, _train(path, plan, first, 2)[0])


@pytest.mark.parametrize("name", WITH_NETWORKS)
def test_a_site_that_missed_a_round_resumes_from_its_latest_networks(make_site: MakeSite, name: str) -> None:
    plan, path = plan_of(name, "training.rounds=3"), make_site()
    ((first, _),) = _rounds(path, plan, count=1)
    third, _ = _train(path, plan, first, 3)
    assert _same(third, _train(path, plan, first, 3)[0])
    _kept(path)[0].unlink()
    assert not _same(third, _train(path, plan, first, 3)[0])


@pytest.mark.parametrize("damage", ["torn", "other shapes", "not finite"])
def test_unusable_kept_networks_are_replaced_by_new_ones(make_site: MakeSite, damage: str) -> None:
    plan, path = plan_of("cps"), make_site()
    ((first, _),) = _rounds(path, plan, count=1)
    (file,) = _kept(path)
    state = RunState(load_site_config(path).storage.folder, "run")
    kept = state.load_networks(before=2)
    assert kept is not None
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "other shapes":
        state.save_networks(1, {name: value[None] for name, value in kept.items()})
    else:
        state.save_networks(1, {name: value * float("nan") for name, value in kept.items()})
    damaged, _ = _train(path, plan, first, 2)
    _kept(path)[0].unlink()
    assert _same(damaged, _train(path, plan, first, 2)[0])


def test_the_discriminator_is_not_trained_at_a_site_without_labels(make_site: MakeSite) -> None:
    plan, path = plan_of("dan", *EAGER), make_site(data=UNLABELED)
    list(_rounds(path, plan))
    fresh = new_regularizer(plan, CPU)
    kept = RunState(load_site_config(path).storage.folder, "run").load_networks(before=3)
    assert fresh is not None
    assert fresh.auxiliary is not None
    assert kept is not None
    assert _same(kept, fresh.auxiliary.state())


@pytest.mark.parametrize("name", NAMES)
def test_a_site_without_labels_and_pseudo_labels_trains_only_if_its_regularizer_applies(
    make_site: MakeSite, name: str
) -> None:
    plan = plan_of(name, "pseudo_labels=null")
    ((_, report),) = _rounds(make_site(data=UNLABELED), plan, count=1)
    assert report.scalars["steps"] == (0 if name in ("dan", "bcp") else plan.training.steps_per_round)


def test_networks_of_the_last_three_rounds_are_kept_however_far_apart(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (1, 4, 5, 9):
        state.save_networks(number, {"w": noise(2, seed=number)})
    assert [path.stem for path in sorted(state.folder.iterdir())] == [f"networks-0000{n}" for n in (4, 5, 9)]
    for before, round_number in ((5, 4), (9, 5), (10, 9), (100, 9)):
        kept = state.load_networks(before)
        assert kept is not None
        assert torch.equal(kept["w"], noise(2, seed=round_number))
    assert state.load_networks(before=4) is None


def test_a_restarted_run_prefers_its_new_networks_to_old_ones(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (6, 7, 8, 1, 2):
        state.save_networks(number, {"w": noise(2, seed=number)})
    kept = state.load_networks(before=3)
    assert kept is not None
    assert torch.equal(kept["w"], noise(2, seed=2))


def test_unreadable_networks_fall_back_to_those_of_the_round_before(tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    for number in (1, 2):
        state.save_networks(number, {"w": noise(2, seed=number)})
    (state.folder / "networks-00002.safetensors").write_bytes(b"torn")
    kept = state.load_networks(before=3)
    assert kept is not None
    assert torch.equal(kept["w"], noise(2, seed=1))
