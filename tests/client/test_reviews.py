"""What reviews say together: whose word counts, and what cannot be said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client.reviews import Decision, ReviewRecord, ReviewStore, decision_on, in_force, with_reviewed_labels
from semisam_core.data.cases import Case, Inventory, Role
from semisam_core.data.scans import file_sha256
from tests.conftest import tiny_plan

TASK = tiny_plan("pseudo_labels=null").task
IMAGE = ("1" * 64,)
SHOWN, DRAWN, OTHER, SOURCE = "a" * 64, "b" * 64, "c" * 64, "d" * 64


def _record(rater: str, decision: Decision, label: str | None = None, **changes: Any) -> ReviewRecord:
    rating = {Decision.ACCEPTED: 1, Decision.CORRECTED: 2, Decision.RATED: 3, Decision.REJECTED: 4}[decision]
    content = {
        "time": "2026-03-01T09:30:00Z",
        "case": "x",
        "rater": rater,
        "ratings": {"blob": rating},
        "minutes": 2.5,
        "decision": decision,
        "pseudo_label": SHOWN,
        "source": SOURCE,
        "label": label,
        "run": "run",
        "round": 3,
        "images": IMAGE,
        "classes": {"blob": (1,)},
        "tool": "page",
    }
    return ReviewRecord.model_validate(content | changes)


ACCEPT = {"decision": Decision.ACCEPTED, "label": SHOWN}
CORRECT = {"decision": Decision.CORRECTED, "label": DRAWN}
CORRECT_AGAIN = {"decision": Decision.CORRECTED, "label": OTHER}
RATE = {"decision": Decision.RATED}
REJECT = {"decision": Decision.REJECTED}


@pytest.mark.parametrize(
    ("said", "label", "rejected"),
    [
        ([("r1", ACCEPT)], SHOWN, False),
        ([("r1", CORRECT), ("r1", CORRECT_AGAIN)], OTHER, False),  # the last word of a rater
        ([("r1", CORRECT), ("r2", CORRECT_AGAIN)], OTHER, False),  # the latest of two
        ([("r1", CORRECT), ("r2", CORRECT_AGAIN), ("r1", CORRECT)], DRAWN, False),
        ([("r1", CORRECT), ("r1", REJECT)], None, True),  # taken back
        ([("r1", CORRECT), ("r1", RATE)], None, False),
        ([("r1", CORRECT), ("r2", RATE)], DRAWN, False),  # a rating says nothing against a label
        ([("r1", ACCEPT), ("r2", REJECT)], None, True),
        ([("r2", REJECT), ("r1", ACCEPT)], None, True),  # in whatever order
        ([("r1", CORRECT), ("r2", REJECT)], DRAWN, True),  # what was rejected is not what was drawn
        ([("r1", REJECT), ("r1", CORRECT)], DRAWN, False),
    ],
)
def test_whose_word_counts(said: list[tuple[str, dict[str, Any]]], label: str | None, rejected: bool) -> None:
    labels, refused = in_force([_record(rater, **what) for rater, what in said], TASK, lambda _: IMAGE)
    assert labels == ({} if label is None else {"x": label})
    assert refused == ({"x": (SOURCE,)} if rejected else {})


def test_words_on_other_images_classes_or_cases_do_not_hold() -> None:
    record = _record("r1", **CORRECT)
    assert in_force([record], TASK, lambda _: None) == ({}, {})
    assert in_force([record], TASK, lambda _: ("2" * 64,)) == ({}, {})
    other = tiny_plan("pseudo_labels=null", "task.classes=[{name: blob, value: 2}]").task
    assert in_force([record], other, lambda _: IMAGE) == ({}, {})


@given(ratings=st.lists(st.integers(1, 4), min_size=1, max_size=3), labeled=st.booleans(), unchanged=st.booleans())
def test_every_decision_follows_from_ratings_and_label(ratings: list[int], labeled: bool, unchanged: bool) -> None:
    named = {str(k): rating for k, rating in enumerate(ratings)}
    perfect = set(ratings) == {1}
    sound = perfect == (labeled and unchanged)
    if not sound:
        with pytest.raises(ValueError, match=r"revision|corrected"):
            decision_on(named, labeled, unchanged)
        return
    decision = decision_on(named, labeled, unchanged)
    assert (decision is Decision.ACCEPTED) == perfect
    assert (decision is Decision.CORRECTED) == (labeled and not unchanged)
    assert (decision is Decision.REJECTED) == (not labeled and 4 in ratings)


@pytest.mark.parametrize(
    "changes",
    [
        {"rater": "Jane Doe"},
        {"ratings": {"blob": 0}},
        {"ratings": {"other": 2}},
        {"minutes": -1.0},
        {"minutes": float("inf")},
        {"label": "../../etc"},
        {"images": ()},
        {"time": "yesterday"},
        {"decision": "accepted"},
        {"more": 1},
        {"tool": "email"},
    ],
)
def test_a_record_that_says_something_impossible_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReviewRecord.model_validate(_record("r1", **CORRECT).model_dump() | changes)


def test_records_come_back_in_order_and_damaged_lines_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ReviewStore(tmp_path)
    records = [_record("r1", **CORRECT), _record("r2", **REJECT)]
    store.append(records[0])
    with (store.folder / "records.jsonl").open("a") as file:
        file.write("{torn\n" + json.dumps({"version": 9}) + "\n")
    store.append(records[1])
    with caplog.at_level(logging.WARNING):
        assert ReviewStore(tmp_path).records() == records
    assert "is skipped" in caplog.text


def test_a_mask_is_kept_once_under_its_hash(tmp_path: Path) -> None:
    store = ReviewStore(tmp_path)
    digest = store.keep(b"mask")
    kept = store.mask(digest).stat().st_mtime_ns
    assert store.keep(b"mask") == digest
    assert (store.mask(digest).read_bytes(), store.mask(digest).stat().st_mtime_ns) == (b"mask", kept)
    assert store.folder.stat().st_mode & 0o077 == 0


def test_only_unlabeled_cases_become_labeled(tmp_path: Path) -> None:
    store = ReviewStore(tmp_path)
    digest = store.keep(b"mask")
    own = tmp_path / "own.nii.gz"
    cases = [
        Case(role.value, (tmp_path / "image.nii.gz",), None if role is Role.UNLABELED else own, role) for role in Role
    ]
    found = with_reviewed_labels(
        Inventory(tuple(cases), ()), dict.fromkeys([role.value for role in Role], digest), store, file_sha256
    )
    assert {case.id: (case.role, case.label) for case in found.cases} == {
        "labeled": (Role.LABELED, own),
        "unlabeled": (Role.LABELED, store.mask(digest)),
        "validation": (Role.VALIDATION, own),
    }
