"""A site's report: gate counts by reason, confidence and losses of a round, and means of the scores it may send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.report import count_gates, log_gates, log_scores, mean_scores, training_scalars
from semisam_core.contract import TRAIN_SCALARS, scalar_mistake
from semisam_core.evaluation import ClassScore, score_case
from semisam_core.files import read_json_lines
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import PseudoLabelStore, StoredPseudoLabel
from semisam_core.training import TrainingResult

NAMES = ("organ", "lesion")
COUNTS = {"labeled": 1, "unlabeled": 2, "validation": 3, "quarantined": 4}


Make = Callable[[float, float, tuple[Refusal | None, ...]], StoredPseudoLabel]


@pytest.fixture
def label(tmp_path: Path) -> Make:
    """Return what stores a pseudo-label of a target and an uncertainty, and reads it back as a round does."""
    store = PseudoLabelStore(tmp_path / "pseudo_labels")

    def make(target: float, uncertainty: float, refusals: tuple[Refusal | None, ...]) -> StoredPseudoLabel:
        store.save("scan", _label(target, uncertainty, refusals))
        stored = store.open("scan")
        assert stored is not None
        return stored

    return make


def _label(target: float, uncertainty: float, refusals: tuple[Refusal | None, ...]) -> PseudoLabel:
    """Return a pseudo-label of two classes, constant where a class was accepted and 0 where it was refused."""
    valid = torch.tensor([refusal is None for refusal in refusals])
    accepted = valid.float()[:, None, None, None].expand(2, 4, 4, 4)
    return PseudoLabel(target * accepted, uncertainty * accepted, valid, refusals, target * accepted)


def _scored(offset: int) -> list[ClassScore | None]:
    """Return a case's scores: an organ found `offset` voxels away from where it is, and no lesion."""
    truth, found = torch.zeros(16, 16, 16, dtype=torch.uint8), torch.zeros(16, 16, 16, dtype=torch.uint8)
    truth[4:10, 4:10, 4:10] = 1
    found[4 + offset : 10 + offset, 4:10, 4:10] = 1
    return [score_case(found, truth, 1, (1.0, 1.0, 1.0), 1.0)[0], None]


def test_gates_are_counted_by_scan_class_and_reason() -> None:
    scans = [(None, Refusal.EMPTY), (Refusal.EMPTY, Refusal.TOO_SMALL), (None, None)]
    assert count_gates(scans) == {"accepted": 3, "gated": 3, "gated.empty": 2, "gated.too-small": 1}
    assert count_gates([]) == {"accepted": 0, "gated": 0}


def test_a_rounds_scalars_are_agreed_ones_and_leave_out_losses_that_did_not_apply(label: Make) -> None:
    labels = {"x": label(1.0, 0.0, (None, Refusal.EMPTY)), "y": label(1.0, 1.0, (None, None))}
    result = TrainingResult(7, {"consistency": 0.5, "generalist": 0.25}, {"consistency": 2.0, "generalist": 0.1})
    scalars = training_scalars(COUNTS, labels, result, 3.5)
    assert {name: scalars[name] for name in ("labeled", "unlabeled", "accepted", "gated", "gated.empty", "steps")} == {
        "labeled": 1,
        "unlabeled": 2,
        "accepted": 3,
        "gated": 1,
        "gated.empty": 1,
        "steps": 7,
    }
    assert (scalars["loss.consistency"], scalars["loss.generalist"], scalars["seconds"]) == (0.5, 0.25, 3.5)
    assert (scalars["gradient.consistency"], scalars["gradient.generalist"]) == (2.0, 0.1)
    assert not {"loss.supervised", "gradient.supervised"} & set(scalars)
    assert set(scalars) <= set(TRAIN_SCALARS)
    assert [scalar_mistake(name, value) for name, value in scalars.items()] == [None] * len(scalars)


def test_confidence_is_the_mean_over_accepted_pairs(label: Make) -> None:
    sure, unsure = label(1.0, 0.0, (None, Refusal.EMPTY)), label(1.0, 1.0, (None, None))
    result = TrainingResult(0, {}, {})
    confidence = training_scalars(COUNTS, {"x": sure, "y": unsure}, result, 0.0)["confidence"]
    assert confidence == pytest.approx((1 + 2 * torch.tensor(-1.0).exp().item()) / 3)
    refused = label(1.0, 0.0, (Refusal.EMPTY, Refusal.EMPTY))
    assert training_scalars(COUNTS, {"x": refused}, result, 0.0)["confidence"] == 0
    assert training_scalars(COUNTS, {}, result, 0.0)["confidence"] == 0


def test_only_allowed_scores_of_scored_classes_are_averaged() -> None:
    near, far = _scored(0), _scored(2)
    assert near[0] is not None
    assert far[0] is not None
    assert mean_scores([near, far], NAMES, ("dice", "cases")) == {
        "dice.organ": pytest.approx((near[0].dice + far[0].dice) / 2),
        "cases.organ": 2,
    }
    assert mean_scores([near, far], NAMES, ()) == {}
    assert mean_scores([], NAMES, ("dice",)) == {}


def test_gates_and_scores_are_logged_per_class_at_the_site(tmp_path: Path, label: Make) -> None:
    log_gates(tmp_path / "gates.jsonl", 4, {"x": label(1.0, 0.0, (None, Refusal.TOO_LARGE))}, NAMES)
    assert read_json_lines(tmp_path / "gates.jsonl") == [
        {"round": 4, "class": "organ", "accepted": 1, "gated": 0},
        {"round": 4, "class": "lesion", "accepted": 0, "gated": 1, "gated.too-large": 1},
    ]
    log_gates(tmp_path / "none.jsonl", 4, {}, NAMES)
    assert not (tmp_path / "none.jsonl").exists()
    scores = _scored(1)
    log_scores(tmp_path / "scores.jsonl", 4, "case-7", scores, {1: "organ", 2: "lesion"})
    organ, lesion = read_json_lines(tmp_path / "scores.jsonl")
    assert scores[0] is not None
    assert (organ["case"], organ["class"], organ["dice"]) == ("case-7", "organ", scores[0].dice)
    assert lesion == {"round": 4, "case": "case-7", "class": "lesion"}
