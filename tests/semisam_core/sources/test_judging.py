"""Registered labels judge the other sources where there is no truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semisam_core.evaluation import dice_of
from semisam_core.sources.base import Evidence, SourceName
from semisam_core.sources.judging import NAMES, as_reliability, judged_reliability


def _ball(shift: int = 0) -> Tensor:
    maps = torch.full((1, 12, 12, 12), 0.1)
    maps[:, 2 + shift : 7 + shift, 3:8, 3:8] = 0.9
    return maps


def _judged(*records: dict[SourceName, Tensor]) -> dict[str, float]:
    found = judged_reliability([{name: Evidence.of(maps) for name, maps in each.items()} for each in records], 1)
    return {name: float(found[number, 0]) for number, name in enumerate(NAMES)}


def test_a_source_is_as_reliable_as_its_mean_dice_with_the_registered_label() -> None:
    records = [
        {SourceName.REGISTRATION: _ball(), SourceName.SPECIALIST: _ball(shift), SourceName.FEATURE_HEAD: _ball(4)}
        for shift in (0, 2)
    ]
    judged = _judged(*records)
    dice = [float(dice_of(_ball(shift)[0] > 0.5, _ball()[0] > 0.5) or 0) for shift in (0, 2, 4)]
    assert judged[SourceName.SPECIALIST] == pytest.approx((dice[0] + dice[1]) / 2)
    assert judged[SourceName.FEATURE_HEAD] == pytest.approx(dice[2])
    assert judged[SourceName.REGISTRATION] == judged[SourceName.SPECIALIST] > judged[SourceName.FEATURE_HEAD]
    assert torch.tensor(judged[SourceName.GENERALISTS]).isnan()


def test_a_source_that_finds_nothing_is_not_reliable() -> None:
    assert _judged({SourceName.REGISTRATION: _ball(), SourceName.SPECIALIST: torch.zeros(1, 12, 12, 12)}) == {
        name: 0 if name in (SourceName.REGISTRATION, SourceName.SPECIALIST) else pytest.approx(torch.nan, nan_ok=True)
        for name in NAMES
    }


@pytest.mark.parametrize("judge", [None, torch.zeros(1, 12, 12, 12)])
def test_without_a_registered_label_nothing_is_judged(judge: Tensor | None) -> None:
    record = {SourceName.SPECIALIST: _ball()} | ({} if judge is None else {SourceName.REGISTRATION: judge})
    assert all(torch.tensor(value).isnan() for value in _judged(record).values())


def test_classes_are_judged_separately() -> None:
    truth = torch.cat([_ball(), _ball(5)])
    half = torch.cat([_ball(), _ball(1)])
    evidence = {SourceName.REGISTRATION: Evidence.of(truth), SourceName.SPECIALIST: Evidence.of(half)}
    first, second = judged_reliability([evidence], 2)[NAMES.index(SourceName.SPECIALIST)].tolist()
    assert (first, second) == (1.0, pytest.approx(float(dice_of(half[1] > 0.5, truth[1] > 0.5) or 0)))


def test_before_the_first_judgement_no_source_has_a_score() -> None:
    assert as_reliability(torch.zeros(len(NAMES), 2)) == {}
    judged = torch.rand(len(NAMES), 2)
    assert {name: score.tolist() for name, score in as_reliability(judged).items()} == dict(
        zip(NAMES, judged.tolist(), strict=True)
    )


def test_no_other_site_can_make_a_source_count_more_than_fully() -> None:
    judged = torch.rand(len(NAMES), 1)
    judged[0], judged[1] = 1e30, -5.0
    found = as_reliability(judged)
    assert (float(found[NAMES[0]]), float(found[NAMES[1]])) == (1.0, 0.0)
