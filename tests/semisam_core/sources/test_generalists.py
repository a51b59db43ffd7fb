"""Generalists as a source: prompted by what the others say together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semisam_core.generalists import EmbeddingStore
from semisam_core.prompting import Refusal
from semisam_core.sources import generalists
from semisam_core.sources.base import SourceScan
from semisam_core.sources.generalists import PromptedGeneralists
from tests.conftest import blob, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist


def _asked(models: Sequence[FakeGeneralist], store: EmbeddingStore) -> PromptedGeneralists:
    plan = tiny_plan("pseudo_labels.method=evidence", "pseudo_labels.gates.minimum_volume_ml=0.0")
    return PromptedGeneralists(models, store, plan)


def _scan() -> tuple[Tensor, Tensor]:
    """Return a scan (1, H, W, D) of a bright ball and the ball."""
    image, label = blob()
    scan = torch.from_numpy(image)[None]
    return (scan - scan.mean()) / scan.std(), torch.from_numpy(label) == 1


def _as_source(image: Tensor) -> SourceScan:
    return SourceScan(image, (2.0, 2.0, 2.0), 1)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path, 10**9)


def test_the_combination_prompts_though_the_specialist_sees_nothing(store: EmbeddingStore) -> None:
    image, ball = _scan()
    evidence, refusals = _asked([FakeGeneralist()], store).ask(_as_source(image), ball.float()[None])
    assert refusals == (None,)
    assert evidence.answered.tolist() == [True]
    assert float((evidence.foreground[0] > 0.5)[ball].float().mean()) > 0.9


def test_an_island_that_is_attached_to_nothing_is_capped(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ball = _scan()
    image = torch.where(ball, 4.0, -1.0)[None]  # without noise that could attach the island
    first, last = torch.nonzero(ball).amin(0) - 2, torch.nonzero(ball).amax(0)
    prompt = torch.zeros(1, *ball.shape)  # a cuboid with room before the ball
    prompt[0, first[0] : last[0] + 1, first[1] : last[1] + 1, first[2] : last[2] + 1] = 1
    island = (0, *(slice(int(each), int(each) + 2) for each in first))
    image[island] = 4

    def highest() -> float:
        evidence, _ = _asked([FakeGeneralist()], store).ask(_as_source(image), prompt)
        assert float((evidence.foreground[0] > 0.5)[ball].float().mean()) > 0.9
        return float(evidence.foreground[island].max())

    assert 0 < highest() < 0.5
    monkeypatch.setattr(generalists, "without_islands", lambda probability, *_: probability.numpy() > 0.5)
    assert highest() > 0.5


def test_a_combination_that_shows_nothing_prompts_nothing(store: EmbeddingStore) -> None:
    image, ball = _scan()
    model = FakeGeneralist()
    evidence, refusals = _asked([model], store).ask(_as_source(image), torch.zeros(1, *ball.shape))
    assert refusals == (Refusal.EMPTY,)
    assert not bool(evidence.answered.any())
    assert model.prompts == []


def test_a_site_without_generalists_has_no_answer(store: EmbeddingStore) -> None:
    image, ball = _scan()
    evidence, refusals = _asked([], store).ask(_as_source(image), ball.float()[None])
    assert refusals == (None,)
    assert not bool(evidence.answered.any())
