"""A hospital's local work: bad cases quarantined, labels of unlabeled scans never read, every round repeatable."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from client.restore import WeightsNotAgreedError
from client.site import NoUsableCaseError, Site
from client.site_config import load_site_config
from semisam_core.contract import TRAIN_SCALARS, evaluation_scalars
from semisam_core.data.cases import Role
from semisam_core.errors import ConfigError, WeightsError
from semisam_core.files import read_json_lines
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from tests.conftest import blob, tiny_plan, write_nifti

MakeSite = Callable[..., Path]


def _site(path: Path, plan: Plan, round_number: int = 1, run: str = "run") -> Site:
    return Site(load_site_config(path), plan, run, round_number)


def _weights(plan: Plan) -> dict[str, torch.Tensor]:
    return dict(new_specialist(plan).state_dict())


def _train(path: Path, plan: Plan, round_number: int = 1, run: str = "run") -> dict[str, torch.Tensor]:
    weights = _site(path, plan, round_number, run).train(_weights(plan)).weights
    assert weights is not None
    return weights


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_joining_reports_counts_of_usable_cases(make_site: MakeSite, plan: Plan) -> None:
    scalars = _site(make_site(), plan, 0).join().scalars
    assert scalars == {"labeled": 1, "unlabeled": 1, "validation": 1, "quarantined": 0, "generalists": 1}


def test_training_reports_agreed_scalars_and_new_weights(make_site: MakeSite, plan: Plan) -> None:
    report = _site(make_site(), plan).train(_weights(plan))
    assert set(report.scalars) <= set(TRAIN_SCALARS)
    assert report.scalars["steps"] == plan.training.steps_per_round
    assert report.weights is not None
    assert not _same(report.weights, _weights(plan))


def test_the_labels_of_unlabeled_scans_are_never_read(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    path = make_site(cases=4)
    before = _train(path, plan)
    for name in ("case-1", "case-3"):
        write_nifti(tmp_path / "data" / "alpha" / "labels" / f"{name}.nii.gz", np.full((3, 3, 3), 77, np.uint8))
    assert _same(before, _train(path, plan, run="poisoned"))
    for name in ("case-1", "case-3"):
        (tmp_path / "data" / "alpha" / "labels" / f"{name}.nii.gz").unlink()
    assert _same(before, _train(path, plan, run="deleted"))


def test_validation_labels_do_not_affect_training(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    path = make_site()
    before = _train(path, plan)
    write_nifti(tmp_path / "data" / "alpha" / "labels" / "case-2.nii.gz", 1 - blob()[1])
    assert _same(before, _train(path, plan, run="other"))


BAD = {
    "nan": lambda folder: write_nifti(folder / "images" / "case-1.nii.gz", np.full((24, 24, 16), np.nan, np.float32)),
    "truncated": lambda folder: _cut(folder / "images" / "case-1.nii.gz"),
    "4D": lambda folder: write_nifti(folder / "images" / "case-1.nii.gz", np.zeros((24, 24, 16, 2), np.float32)),
    "2D": lambda folder: write_nifti(folder / "images" / "case-1.nii.gz", np.zeros((24, 24), np.float32)),
    "label shape": lambda folder: write_nifti(folder / "labels" / "case-2.nii.gz", blob()[1][:-1]),
    "label affine": lambda folder: write_nifti(folder / "labels" / "case-2.nii.gz", blob()[1], np.eye(4)),
    "label values": lambda folder: write_nifti(folder / "labels" / "case-2.nii.gz", 9 * blob()[1]),
    "no label": lambda folder: (folder / "labels" / "case-2.nii.gz").unlink(),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_case_is_quarantined_with_its_reason_and_the_site_continues(
    make_site: MakeSite, tmp_path: Path, plan: Plan, kind: str
) -> None:
    path = make_site()
    BAD[kind](tmp_path / "data" / "alpha")
    site = _site(path, plan, 0)
    assert site.join().scalars["quarantined"] == 1
    (entry,) = json.loads((site.state.folder / "quarantine.json").read_text())
    assert entry["case"] in ("case-1", "case-2")
    assert len(entry["reason"]) > 20
    assert _site(path, plan).train(_weights(plan)).scalars["steps"] == 2


def test_a_site_with_only_bad_cases_does_not_join(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    path = make_site()
    for image in (tmp_path / "data" / "alpha" / "images").iterdir():
        _cut(image)
    with pytest.raises(NoUsableCaseError, match="all 3 cases are quarantined"):
        _site(path, plan, 0).join()


def test_a_site_without_labels_and_generalists_is_refused(make_site: MakeSite, plan: Plan) -> None:
    path = make_site(data={"labeled": [], "validation": []}, generalists={})
    with pytest.raises(ConfigError, match="no labeled case and none of the plan's generalists"):
        _site(path, plan)


def test_a_wholly_unlabeled_site_trains_on_pseudo_labels_of_the_global_specialist(
    make_site: MakeSite, tmp_path: Path
) -> None:
    plan = tiny_plan("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
    path = make_site(data={"labeled": [], "validation": []})
    scalars = _site(path, plan).train(_weights(plan)).scalars
    assert scalars["labeled"] == 0
    assert scalars["accepted"] == 3
    assert "loss.generalist" in scalars
    assert "loss.supervised" not in scalars


def test_weights_that_are_not_the_plans_specialist_are_refused(make_site: MakeSite, plan: Plan) -> None:
    weights = _weights(plan)
    weights.popitem()
    with pytest.raises(WeightsNotAgreedError, match="1 agreed tensors are missing"):
        _site(make_site(), plan).train(weights)


def test_altered_generalist_weights_stop_the_site_at_joining(make_site: MakeSite) -> None:
    plan = tiny_plan("pseudo_labels.generalists=[lite-medsam]")
    path = make_site(generalists={"lite-medsam": {"weights": "packaged", "sha256": "a" * 64}})
    with pytest.raises(WeightsError, match=r"has SHA-256 [0-9a-f]{64}, expected a{64}"):
        _site(path, plan, 0).join()


def test_a_round_asked_for_again_gives_the_same_weights(make_site: MakeSite) -> None:
    plan = tiny_plan("teacher.start=site")
    path = make_site()
    _train(path, plan, 1)
    second = _train(path, plan, 2)
    assert _same(second, _train(path, plan, 2))


def test_a_site_teacher_resumes_from_the_last_round_and_a_global_one_does_not(make_site: MakeSite) -> None:
    path = make_site()
    for start, differs in (("global", False), ("site", True)):
        plan = tiny_plan(f"teacher.start={start}", "training.steps_per_round=4")
        fresh = _site(path, plan, 2, f"{start}-fresh").train(_weights(plan)).weights
        _train(path, plan, 1, f"{start}-kept")
        kept = _site(path, plan, 2, f"{start}-kept").train(_weights(plan)).weights
        assert fresh is not None
        assert kept is not None
        assert _same(fresh, kept) != differs


def test_pseudo_labels_are_refreshed_on_schedule_and_reused_in_between(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.labeling as module

    made: list[int] = []
    original = module.make_pseudo_label
    monkeypatch.setattr(module, "make_pseudo_label", lambda *a, **k: made.append(1) or original(*a, **k))
    plan = tiny_plan("training.rounds=4", "pseudo_labels.refresh_every=2", "pseudo_labels.first_round=2")
    path = make_site()
    counts = []
    for number in (1, 2, 3, 4):
        _train(path, plan, number)
        counts.append(len(made))
    assert counts == [0, 1, 1, 2]


def test_a_disk_filled_by_embeddings_does_not_stop_the_round(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan("pseudo_labels.prompting.threshold=0.01", "pseudo_labels.gates.minimum_volume_ml=0.0")
    path = make_site()
    expected = _train(path, plan, run="roomy")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("semisam_core.generalists.embedding_store.write_atomically", full)
    site = _site(path, plan, run="full")
    (site.config.storage.folder / "embeddings").rename(site.config.storage.folder / "gone")
    weights = site.train(_weights(plan)).weights
    assert weights is not None
    assert _same(weights, expected)


def test_mean_scores_are_reported_and_per_case_scores_stay_at_the_site(make_site: MakeSite, plan: Plan) -> None:
    path = make_site(cases=4, data={"validation": ["case-2", "case-3"]})
    site = _site(path, plan)
    scalars = site.evaluate(_weights(plan), final=False).scalars
    assert set(scalars) <= set(evaluation_scalars(plan))
    lines = read_json_lines(site.state.folder / "scores.jsonl")
    assert [line["case"] for line in lines] == ["case-2", "case-3"]
    assert scalars["dice.blob"] == pytest.approx(sum(line["dice"] for line in lines) / 2)
    assert scalars["validation"] == scalars["cases.blob"] == 2


def test_a_site_may_withhold_its_scores(make_site: MakeSite, plan: Plan) -> None:
    path = make_site(egress={"validation_scores": []})
    assert _site(path, plan).evaluate(_weights(plan), final=False).scalars == {"validation": 1}


def test_classes_that_the_site_does_not_label_are_not_scored(make_site: MakeSite) -> None:
    plan = tiny_plan("task.classes=[{name: blob, value: 1}, {name: other, value: 2}]")
    scored = {}
    for name, labeled_classes in (("all", "all"), ("some", ["blob"])):
        path = make_site(data={"labeled_classes": labeled_classes})
        site = _site(path, plan, run=name)
        scalars = site.evaluate(_weights(plan), final=False).scalars
        lines = read_json_lines(site.state.folder / "scores.jsonl")
        scored[name] = ({key.split(".")[1] for key in scalars if "." in key}, [line["class"] for line in lines])
    assert scored == {"all": ({"blob", "other"}, ["blob", "other"]), "some": ({"blob"}, ["blob"])}


def test_the_final_evaluation_draws_a_picture_at_the_site(make_site: MakeSite, plan: Plan) -> None:
    site = _site(make_site(), plan)
    site.evaluate(_weights(plan), final=True)
    picture = site.state.folder / "overview.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_outside_the_sites_storage(make_site: MakeSite, tmp_path: Path, plan: Plan) -> None:
    path = make_site()
    before = {p for p in tmp_path.rglob("*") if "storage" not in p.parts}
    site = _site(path, plan)
    site.train(_weights(plan))
    site.evaluate(_weights(plan), final=True)
    assert {p for p in tmp_path.rglob("*") if "storage" not in p.parts} == before


def test_a_pseudo_label_can_be_had_for_one_scan_with_any_specialist_and_is_not_stored(
    make_site: MakeSite, plan: Plan
) -> None:
    site = _site(make_site(), plan)
    (case,) = site.scans.usable(Role.UNLABELED)
    trained = _site(make_site(), plan, run="other").train(_weights(plan)).weights
    assert trained is not None
    first, second = (site.pseudo_label(case, weights) for weights in (_weights(plan), trained))
    assert first is not None
    assert second is not None
    assert first.target.shape == (1, 24, 24, 16)
    assert first.valid.tolist() == [refusal is None for refusal in first.refusals]
    assert not torch.equal(first.target, second.target)  # each was prompted by its own specialist
    assert not list(site.state.folder.glob("pseudo_labels/*"))


def test_there_is_no_pseudo_label_without_a_section_for_it_nor_with_other_weights(make_site: MakeSite) -> None:
    plan = tiny_plan("pseudo_labels=null")
    site = _site(make_site(), plan)
    (case,) = site.scans.usable(Role.UNLABELED)
    assert site.pseudo_label(case, _weights(plan)) is None
    with pytest.raises(WeightsNotAgreedError):
        site.pseudo_label(case, {"alien": torch.zeros(1)})
