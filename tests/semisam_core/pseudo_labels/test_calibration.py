"""Trust in each generalist is earned on the site's labeled scans, and plausible volumes are learned from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semisam_core.generalists import EmbeddingStore, Prompts, Segmentation, VolumeGrid
from semisam_core.pseudo_labels.calibration import LabeledExample, brier_scores, calibrate
from semisam_core.pseudo_labels.ensemble import GeneralistOutput
from tests.conftest import blob, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist


class Vague(FakeGeneralist):
    """Says 0.6 within its boxes, whatever is there."""

    def __init__(self) -> None:
        super().__init__("1" * 64)
        self.card = replace(self.card, name="vague")

    def segment(self, embeddings: object, prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        probability = torch.zeros(grid.shape)
        for box in prompts.boxes:
            top, left, bottom, right = (round(bound) for bound in box.bounds)
            probability[top : bottom + 1, left : right + 1, box.index] = 0.6
        return Segmentation(probability, {box.index: 0.5 for box in prompts.boxes})


class Silent(Vague):
    def segment(self, *_: object) -> Segmentation:
        raise RuntimeError("out of memory")


def _example(seed: int = 0) -> LabeledExample:
    image, label = blob(seed=seed)
    volume, truth = torch.from_numpy(image), torch.from_numpy(label)
    teacher = torch.stack([1 - truth.float(), truth.float()])
    return LabeledExample(((volume - volume.mean()) / volume.std())[None], truth, teacher)


def _store(folder: Path) -> EmbeddingStore:
    return EmbeddingStore(folder / "embeddings", 10**9)


def test_a_model_that_is_right_on_the_labeled_scans_is_trusted_more(tmp_path: Path) -> None:
    calibration = calibrate([_example(0), _example(1)], [FakeGeneralist(), Vague()], _store(tmp_path), tiny_plan())
    assert calibration.trust["fake"] > 2 * calibration.trust["vague"]


def test_a_model_that_never_answers_is_trusted_no_more_than_the_worst(tmp_path: Path) -> None:
    calibration = calibrate([_example()], [FakeGeneralist(), Silent()], _store(tmp_path), tiny_plan())
    assert calibration.trust["vague"] == calibration.trust["fake"]


def test_without_labeled_scans_all_count_the_same(tmp_path: Path) -> None:
    calibration = calibrate([], [FakeGeneralist(), Vague()], _store(tmp_path), tiny_plan())
    assert calibration.trust == {}
    assert calibration.volume_range_ml(0, 2.0) is None


def test_a_single_generalist_is_not_asked_about_labeled_scans(tmp_path: Path) -> None:
    model = FakeGeneralist()
    calibration = calibrate([_example()], [model], _store(tmp_path), tiny_plan())
    assert model.embedded == []
    assert calibration.trust == {}


def test_plausible_volumes_are_those_of_the_expert_masks_widened_by_a_factor(tmp_path: Path) -> None:
    examples = [_example(0), _example(1)]
    calibration = calibrate(examples, [FakeGeneralist()], _store(tmp_path), tiny_plan())
    volumes = [float((example.label > 0).sum()) * 8 / 1000 for example in examples]
    found = calibration.volume_range_ml(0, 2.0)
    assert found == pytest.approx((min(volumes) / 2, max(volumes) * 2))


def test_errors_are_taken_where_anybody_sees_foreground() -> None:
    truth = torch.zeros(2, 2, 1, dtype=torch.bool)
    truth[0, 0, 0] = True
    right = torch.zeros(1, 2, 2, 1)
    right[0, 0, 0, 0] = 1.0
    wrong = torch.zeros(1, 2, 2, 1)
    wrong[0, 1, 1, 0] = 1.0
    scores = brier_scores({"right": GeneralistOutput(right, 1.0), "wrong": GeneralistOutput(wrong, 1.0)}, truth)
    assert scores == {"right": 0.0, "wrong": 1.0}
    assert brier_scores({}, truth) == {}
    assert brier_scores({"empty": GeneralistOutput(torch.zeros(1, 2, 2, 1), 1.0)}, torch.zeros_like(truth)) == {}
