"""Drawing patches in the background changes nothing but the waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from semisam_core import training
from semisam_core.data.patches import TrainingScan
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.prefetch import AHEAD, Prefetch
from semisam_core.training import LocalRound, new_teacher, train_round
from tests.conftest import blob, tiny_plan


class AtOnce:
    """What `Prefetch` stands in for: each piece is made when it is asked for."""

    def __init__(self, make: Callable[[], object], count: int) -> None:
        self.next, self.waited_s = make, 0.0

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _scan(seed: int) -> TrainingScan:
    image, label = blob(seed=seed)
    return TrainingScan(torch.from_numpy(image)[None] / 100, torch.from_numpy(label))


def _weights(plan: Plan) -> torch.Tensor:
    specialist = new_specialist(plan)
    labeled = [lambda k=k: _scan(k) for k in range(3)]
    unlabeled = [lambda k=k: TrainingScan(_scan(k).image) for k in range(3, 6)]
    train_round(LocalRound(plan, specialist, new_teacher(specialist), labeled, unlabeled, 1, 5, torch.device("cpu")))
    return torch.cat([value.reshape(-1) for value in specialist.state_dict().values()])


def test_weights_are_those_of_training_without_it_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan("pseudo_labels=null", "training.steps_per_round=6", "training.labeled_batch=2")
    ahead = _weights(plan)
    monkeypatch.setattr(training, "Prefetch", AtOnce)
    assert torch.equal(ahead, _weights(plan))


def test_pieces_come_in_order_and_none_is_made_in_vain() -> None:
    made: list[int] = []
    with Prefetch(lambda: made.append(len(made)) or made[-1], 5) as pieces:
        assert [pieces.next() for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(IndexError):
            pieces.next()
    assert made == [0, 1, 2, 3, 4]


def test_the_next_pieces_are_made_while_one_is_used() -> None:
    made: list[int] = []
    with Prefetch(lambda: made.append(0), 50) as pieces:
        pieces.next()
        time.sleep(0.2)
        assert len(made) == 1 + AHEAD


def test_an_error_is_raised_where_the_piece_is_used_and_the_thread_ends() -> None:
    def fail() -> None:
        raise ValueError("a scan is torn")

    with pytest.raises(ValueError, match="a scan is torn"), Prefetch(fail, 3) as pieces:
        pieces.next()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
