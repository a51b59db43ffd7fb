"""Generalists earn trust on the site's labeled scans, and plausible volumes are learned from expert masks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from semisam_core.generalists import Prompts, Segmentation, VolumeGrid
from semisam_core.pseudo_labels.calibration import Calibration, LabeledExample, brier_scores, calibrate
from semisam_core.pseudo_labels.ensemble import GeneralistOutput
from tests.conftest import blob, tiny_plan
from tests.semisam_core.generalists.fake import FakeGeneralist
from tests.semisam_core.pseudo_labels.scenes import (
    FIRST,
    SECOND,
    TWO_CLASSES,
    Broken,
    cuboid,
    image_of,
    plain_plan,
    store_in,
    teacher_of,
)


class Vague(FakeGeneralist):
    """Answers 0.6 everywhere inside its boxes."""

    def __init__(self) -> None:
        super().__init__("1" * 64)
        self.card = replace(self.card, name="vague")

    def segment(self, embeddings: object, prompts: Prompts, grid: VolumeGrid) -> Segmentation:
        probability = torch.zeros(grid.shape)
        for box in prompts.boxes:
            top, left, bottom, right = (round(bound) for bound in box.bounds)
            probability[top : bottom + 1, left : right + 1, box.index] = 0.6
        return Segmentation(probability, {box.index: 0.5 for box in prompts.boxes})


def _example(seed: int = 0) -> LabeledExample:
    image, label = blob(seed=seed)
    volume, truth = torch.from_numpy(image), torch.from_numpy(label)
    return LabeledExample(((volume - volume.mean()) / volume.std())[None], truth, partial(teacher_of, truth.float()))


def test_a_model_that_is_right_on_the_labeled_scans_is_trusted_more(tmp_path: Path) -> None:
    calibration = calibrate([_example(0), _example(1)], [FakeGeneralist(), Vague()], store_in(tmp_path), tiny_plan())
    assert calibration.trust["fake"] > 2 * calibration.trust["vague"]


def test_trust_is_the_inverse_of_the_mean_error_over_scans(tmp_path: Path) -> None:
    models, store = [FakeGeneralist(), Vague()], store_in(tmp_path)
    one, other, both = (
        calibrate(examples, models, store, tiny_plan()).trust["vague"]
        for examples in ([_example(0)], [_example(1)], [_example(0), _example(1)])
    )
    assert 1 / both == pytest.approx((1 / one + 1 / other) / 2)


def test_a_model_that_answers_nothing_is_trusted_as_little_as_the_worst(tmp_path: Path) -> None:
    models = [FakeGeneralist(), Vague(), Broken("silent")]
    trust = calibrate([_example()], models, store_in(tmp_path), tiny_plan()).trust
    assert trust["silent"] == trust["vague"] < trust["fake"]


def test_without_labeled_scans_all_models_count_the_same(tmp_path: Path) -> None:
    calibration = calibrate([], [FakeGeneralist(), Vague()], store_in(tmp_path), tiny_plan())
    assert calibration.trust == {}
    assert calibration.volume_range_ml(0, 2.0) is None


def test_a_single_generalist_is_not_run_on_labeled_scans(tmp_path: Path) -> None:
    model = FakeGeneralist()
    calibration = calibrate([_example()], [model], store_in(tmp_path), tiny_plan())
    assert model.embedded == []
    assert calibration.trust == {}


def test_volumes_are_those_of_each_class_in_millilitres(tmp_path: Path) -> None:
    label = (cuboid(FIRST) + 2 * cuboid(SECOND)).to(torch.uint8)
    example = LabeledExample(image_of(cuboid(FIRST)), label, partial(teacher_of, cuboid(FIRST), cuboid(SECOND)))
    plan = plain_plan(TWO_CLASSES)
    volumes = calibrate([example, example], [FakeGeneralist()], store_in(tmp_path), plan).volumes_ml
    ml = [float(cuboid(box).sum()) * 1.5 * 2 * 3 / 1000 for box in (FIRST, SECOND)]
    assert volumes == (pytest.approx((ml[0], ml[0])), pytest.approx((ml[1], ml[1])))
    partly = calibrate([example], [FakeGeneralist()], store_in(tmp_path), plan, annotated=[2])
    assert partly.volumes_ml == ((), pytest.approx((ml[1],)))


def test_a_class_absent_from_a_scan_has_no_volume_there(tmp_path: Path) -> None:
    label = cuboid(FIRST).to(torch.uint8)
    example = LabeledExample(image_of(cuboid(FIRST)), label, partial(teacher_of, cuboid(FIRST), 0 * cuboid(SECOND)))
    volumes = calibrate([example], [FakeGeneralist()], store_in(tmp_path), plain_plan(TWO_CLASSES)).volumes_ml
    assert [len(each) for each in volumes] == [1, 0]


def test_the_plausible_range_is_that_of_the_class_widened_by_the_factor() -> None:
    calibration = Calibration(volumes_ml=((10.0, 40.0), (3.0,)))
    assert calibration.volume_range_ml(0, 2.0) == (5.0, 80.0)
    assert calibration.volume_range_ml(1, 1.5) == (2.0, 4.5)
    assert calibration.volume_range_ml(2, 1.5) is None


def test_errors_count_where_the_expert_or_any_model_sees_foreground() -> None:
    truth = torch.zeros(2, 3, 1, dtype=torch.bool)
    truth[0, 0, 0] = True
    right = torch.zeros(1, 2, 3, 1)
    right[0, 0, 0, 0] = 1.0
    wrong = torch.zeros(1, 2, 3, 1)
    wrong[0, 1, 1, 0] = 1.0
    scores = brier_scores({"right": GeneralistOutput(right, 1.0), "wrong": GeneralistOutput(wrong, 1.0)}, truth)
    assert scores == {"right": 0.0, "wrong": 1.0}


def test_without_an_answer_or_foreground_there_is_no_error() -> None:
    truth = torch.zeros(2, 3, 1, dtype=torch.bool)
    assert brier_scores({}, truth) == {}
    assert brier_scores({"empty": GeneralistOutput(torch.zeros(1, 2, 3, 1), 1.0)}, truth) == {}
