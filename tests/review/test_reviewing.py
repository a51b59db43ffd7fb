"""From pseudo-labels to labels at one site: what is looked at first, kept, and trained on in the next round."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from client.manifest import manifest_of
from client.reviews import Decision
from client.site_config import load_site_config
from review.masks import read_mask
from review.reviewing import ReviewError, Reviewing
from semisam_core.data.cases import Case, Role
from semisam_core.errors import CaseError, ConfigError
from semisam_core.files import read_json_lines
from tests.conftest import blob, tiny_plan, write_nifti
from tests.review.site import EAGER, PLAN, corrected, reviewing, site_in, trained, weights

MakeSite = Callable[..., Path]


@pytest.fixture
def site(make_site: MakeSite) -> Path:
    """One labeled case, three unlabeled ones with pseudo-labels, one for validation."""
    return trained(make_site(cases=5))


def test_the_worklist_names_unlabeled_scans_only_and_the_round_of_their_pseudo_labels(site: Path) -> None:
    review = reviewing(site)
    entries = review.worklist()
    assert review.store.folder.stat().st_mode & 0o077 == 0
    assert {entry.case for entry in entries} == {"case-1", "case-3", "case-4"}
    assert {entry.round for entry in entries} == {1}
    assert [entry.doubt for entry in entries] == sorted((entry.doubt for entry in entries), reverse=True)


def test_a_pseudo_label_is_shown_on_the_scans_own_grid(site: Path, tmp_path: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    mask, grid = read_mask(review.store.mask(opened.sha256), opened.case, PLAN)
    assert np.array_equal(mask, opened.mask)
    assert mask.shape == grid.shape == (24, 24, 16)
    true = blob((24, 24, 16), 1)[1] > 0
    assert (mask[true] == 1).all()
    assert not mask[0].any()


def test_a_correction_becomes_a_label_with_its_provenance(site: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    record = review.keep(opened, {"blob": 2}, 4.25, corrected(opened), "page")
    assert (record.decision, record.rater, record.minutes, record.round) == (Decision.CORRECTED, "r1", 4.25, 1)
    assert record.label is not None
    assert record.pseudo_label == opened.sha256 != record.label
    assert reviewing(site).store.records() == [record]
    mask, _ = read_mask(review.store.mask(record.label), opened.case, PLAN)
    assert np.array_equal(mask, corrected(opened))
    assert review.store.folder.stat().st_mode & 0o077 == 0


def test_a_pseudo_label_that_needs_no_revision_is_the_label(site: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    record = review.keep(opened, {"blob": 1}, 0.5, None, "page")
    assert (record.decision, record.label) == (Decision.ACCEPTED, opened.sha256)


@pytest.mark.parametrize(
    ("rating", "change", "says"),
    [(1, True, "rate a changed one 2 or 3"), (2, False, "nothing was corrected"), (5, True, "less than or equal to 4")],
)
def test_ratings_and_labels_that_contradict_each_other_are_refused(
    site: Path, rating: int, change: bool, says: str
) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    label = corrected(opened) if change else opened.mask
    with pytest.raises(ReviewError, match=says):
        review.keep(opened, {"blob": rating}, 1.0, label, "page")
    assert review.store.records() == []


def test_every_class_must_be_rated(site: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    with pytest.raises(ReviewError, match="every class is rated once: blob"):
        review.keep(opened, {"other": 4}, 1.0, None, "page")


def test_a_mask_of_another_shape_or_class_is_refused(site: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    with pytest.raises(CaseError, match="has shape"):
        review.keep(opened, {"blob": 2}, 1.0, opened.mask[:-1], "page")
    with pytest.raises(CaseError, match="has the class 2"):
        review.keep(opened, {"blob": 2}, 1.0, opened.mask + 1, "page")


def test_the_next_round_trains_on_reviewed_labels_and_a_repeated_round_does_not_change(site: Path) -> None:
    review = reviewing(site)
    first = site_in(site, 2).train(weights())
    opened = review.open("case-1")
    review.keep(opened, {"blob": 3}, 12.0, corrected(opened), "page")
    again, third = site_in(site, 2).train(weights()), site_in(site, 3, tiny_plan(*EAGER, "training.rounds=3"))
    assert first.weights is not None
    assert again.weights is not None
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert (again.scalars["labeled"], again.scalars["unlabeled"]) == (1, 3)
    scalars = third.train(weights()).scalars
    assert (scalars["labeled"], scalars["unlabeled"]) == (2, 2)
    labeled = third.scans.usable(Role.LABELED)
    assert [case.id for case in labeled] == ["case-0", "case-1"]
    scan = third.scans.load(labeled[1])
    assert scan is not None
    assert scan.label is not None
    assert int(scan.label.sum()) == int(corrected(opened).sum())  # both grids are the same here


def test_reviewing_changes_neither_split_nor_manifest(site: Path) -> None:
    before, config = site_in(site, 0), load_site_config(site)
    manifest = manifest_of(config, PLAN).hash
    review = reviewing(site)
    opened = review.open("case-1")
    review.keep(opened, {"blob": 1}, 1.0, None, "page")
    after = site_in(site, 0)
    assert before.scans.split_sha256 == after.scans.split_sha256
    assert after.join().scalars == {"labeled": 2, "unlabeled": 2, "validation": 1, "quarantined": 0, "generalists": 1}
    assert manifest_of(load_site_config(site), PLAN).hash == manifest
    kept = json.loads((after.state.folder / "split.json").read_text())["roles"]
    assert kept["case-1"] == "unlabeled"


def test_a_reviewed_label_never_comes_into_validation(site: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    review.keep(opened, {"blob": 1}, 1.0, None, "page")
    text = site.read_text().replace("- case-2", "- case-1")  # in the next run, for which the record still stands
    site.write_text(text)
    scans = site_in(site, 1, run="next").scans
    (case,) = scans.usable(Role.VALIDATION)
    assert case.id == "case-1"
    assert case.label == Path(load_site_config(site).data.labels or "") / "case-1.nii.gz"
    assert [each.id for each in scans.usable(Role.LABELED)] == ["case-0"]


def test_a_split_by_rule_does_not_see_reviewed_labels(make_site: MakeSite, tmp_path: Path) -> None:
    rule = {"validation_share": 0.5, "labeled_patients": "all", "seed": 0}
    path = make_site(cases=8, data={"labeled": [], "validation": [], "split": rule})
    for k in range(4, 8):
        (tmp_path / "data" / "alpha" / "labels" / f"case-{k}.nii.gz").unlink()
    trained(path)
    before = [case.id for case in site_in(path, 0).scans.usable(Role.VALIDATION)]
    review = reviewing(path)
    assert {entry.case for entry in review.worklist()} == {f"case-{k}" for k in range(4, 8)}
    for k in range(4, 8):
        review.keep(review.open(f"case-{k}"), {"blob": 1}, 1.0, None, "page")
    scans = site_in(path, 1, run="next").scans
    assert [case.id for case in scans.usable(Role.VALIDATION)] == before
    assert {f"case-{k}" for k in range(4, 8)} <= {case.id for case in scans.usable(Role.LABELED)}


def test_a_rejected_pseudo_label_teaches_nothing_until_it_is_made_anew(site: Path) -> None:
    review = reviewing(site)
    before = site_in(site, 2, tiny_plan(*EAGER, "training.rounds=3")).train(weights()).scalars
    record = review.keep(review.open("case-1"), {"blob": 4}, 1.0, None, "page")
    assert record.decision is Decision.REJECTED
    plan = tiny_plan(*EAGER, "training.rounds=9", "pseudo_labels.refresh_every=4")
    scalars = site_in(site, 4, plan).train(weights()).scalars
    assert (before["accepted"], scalars["accepted"]) == (3, 2)
    assert (scalars["labeled"], scalars["unlabeled"]) == (1, 3)
    assert plan.refreshes(5)
    changed = {name: value + 0.1 for name, value in weights().items()}  # another specialist prompts otherwise
    assert site_in(site, 5, plan).train(changed).scalars["accepted"] == 3


def test_what_a_rater_has_rated_leaves_the_worklist_until_the_pseudo_label_changes(site: Path) -> None:
    review = reviewing(site)
    review.keep(review.open("case-1"), {"blob": 3}, 1.0, None, "page")
    assert {entry.case for entry in review.worklist()} == {"case-3", "case-4"}
    assert {entry.case for entry in reviewing(site, "r2").worklist()} == {"case-1", "case-3", "case-4"}
    (label,) = (path for path in (review._folder / "pseudo_labels").iterdir() if _is_of(review, "case-1", path))
    label.write_bytes(label.read_bytes() + b" ")
    assert {entry.case for entry in review.worklist()} >= {"case-3", "case-4"}


def _is_of(review: Reviewing, case: str, path: Path) -> bool:
    return path.stem == next(key for name, key, _ in review._scans.keyed_pair_loaders(Role.UNLABELED) if name == case)


def test_a_second_rater_sees_what_the_first_was_shown_though_it_is_labeled_now(site: Path) -> None:
    first = reviewing(site)
    opened = first.open("case-3")
    first.keep(opened, {"blob": 2}, 3.0, corrected(opened), "page")
    second = reviewing(site, "r2", second=True)
    assert [entry.case for entry in second.worklist()] == ["case-3"]
    again = second.open("case-3")
    assert np.array_equal(again.mask, opened.mask)
    assert again.sha256 == opened.sha256
    second.keep(again, {"blob": 3}, 2.0, None, "page")
    assert second.worklist() == []


def test_an_altered_or_lost_label_is_not_trained_on(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    record = review.keep(opened, {"blob": 2}, 1.0, corrected(opened), "page")
    assert record.label is not None
    path = review.store.mask(record.label)
    whole = path.read_bytes()
    for content in (whole[:-1], None):
        path.unlink() if content is None else path.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            assert site_in(site, 0).scans.counts()["labeled"] == 1
        assert "gone or was altered" in caplog.text
        caplog.clear()
    path.write_bytes(whole)
    assert site_in(site, 0).scans.counts()["labeled"] == 2


def test_a_label_of_another_image_or_of_other_classes_is_not_trained_on(site: Path, tmp_path: Path) -> None:
    review = reviewing(site)
    review.keep(review.open("case-1"), {"blob": 1}, 1.0, None, "page")
    other = tiny_plan(*EAGER, "task.classes=[{name: other, value: 1}]")
    assert site_in(site, 0, other).scans.counts()["labeled"] == 1
    assert site_in(site, 0).scans.counts()["labeled"] == 2
    write_nifti(tmp_path / "data" / "alpha" / "images" / "case-1.nii.gz", blob((24, 24, 16), 9)[0])
    assert site_in(site, 0).scans.counts()["labeled"] == 1


def test_a_site_may_leave_reviewed_labels_out(site: Path) -> None:
    review = reviewing(site)
    review.keep(review.open("case-1"), {"blob": 1}, 1.0, None, "page")
    site.write_text(site.read_text().replace("data:\n", "data:\n  reviewed: false\n"))
    assert site_in(site, 0).scans.counts()["labeled"] == 1


def test_a_private_plan_is_not_reviewed(make_site: MakeSite) -> None:
    plan = tiny_plan("privacy={noise_multiplier: 1.0, sampling_rate: 0.5}", *EAGER)
    with pytest.raises(ConfigError, match="differential privacy"):
        reviewing(make_site(), plan=plan)


@pytest.mark.parametrize("name", ["Dr. Jane Doe", "", "../x", "r" * 64])
def test_raters_have_pseudonyms(site: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a pseudonym is expected"):
        reviewing(site, name)


def test_a_site_without_pseudo_labels_and_an_unknown_run_are_said(make_site: MakeSite, site: Path) -> None:
    with pytest.raises(ConfigError, match="has pseudo-labels"):
        reviewing(make_site("beta"))
    with pytest.raises(ConfigError, match="no run of this name"):
        Reviewing(load_site_config(site), PLAN, "r1", "other")
    with pytest.raises(ReviewError, match="no unlabeled scan of this name"):
        reviewing(site).open("case-0")
    with pytest.raises(ReviewError, match="no unlabeled scan of this name"):
        reviewing(site).open("case-2")  # for validation


def test_nothing_of_a_review_is_written_outside_its_folder(site: Path, tmp_path: Path) -> None:
    review = reviewing(site)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    opened = review.open("case-1")
    review.keep(opened, {"blob": 2}, 1.0, corrected(opened), "page")
    after = {path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)}
    assert {path for path in after if review.store.folder not in path.parents} <= {
        review.store.folder.parent / "files.jsonl"
    }
    (line,) = read_json_lines(review.store.folder / "records.jsonl")
    assert str(tmp_path) not in json.dumps(line)


def test_the_mask_on_disk_holds_nothing_but_geometry_of_the_scans_header(site: Path) -> None:
    review = reviewing(site)
    opened = review.open("case-1")
    case = Case("case-1", opened.case.images, review.store.mask(opened.sha256), Role.LABELED)
    assert case.label is not None
    import nibabel as nib

    header = nib.load(case.label).header
    assert (bytes(header["descrip"]).strip(b"\0"), bytes(header["intent_name"]).strip(b"\0")) == (b"", b"")
